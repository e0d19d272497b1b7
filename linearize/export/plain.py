"""What formats ask of a model before they begin."""

from __future__ import annotations

import torch
from torch import nn

from linearize.export.face import Format, Refusal
from linearize.gating.gate import ChannelGate
from linearize.zoo.stock import is_ours

__all__ = ["allowance", "floating_types", "gated", "own_layers"]


def floating_types(model: nn.Module) -> list[torch.dtype]:
    """Floating types of the parameters, each once, in order of first appearance."""
    return list(dict.fromkeys(p.dtype for p in model.parameters() if p.is_floating_point()))


def allowance(chosen: Format, model: nn.Module) -> float:
    """What an exported model may be off by."""
    return max((chosen.tolerances.get(kind, 1e-5) for kind in floating_types(model)), default=1e-5)


def gated(model: nn.Module) -> Refusal | None:
    """A gate that is still there."""
    found = next((path for path, module in model.named_modules() if isinstance(module, ChannelGate)), None)
    return None if found is None else Refusal(found, "is still a gate")


def own_layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Layers that no library but this one has, outermost first, without what is inside them."""
    found: list[tuple[str, nn.Module]] = []
    for path, module in model.named_modules():
        if is_ours(module) and not any(path.startswith(f"{outer}.") for outer, _ in found):
            found.append((path, module))
    return found
