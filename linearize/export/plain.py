"""What formats ask of a model before they begin."""

from __future__ import annotations

import torch
from torch import nn

from linearize.export.face import Format, Refusal
from linearize.gating.gate import ChannelGate

__all__ = ["allowance", "floating_types", "gated"]


def floating_types(model: nn.Module) -> list[torch.dtype]:
    """Floating types of the parameters, each once, in order of first appearance."""
    return list(dict.fromkeys(p.dtype for p in model.parameters() if p.is_floating_point()))


def allowance(chosen: Format, model: nn.Module) -> float:
    """What an exported model may be off by."""
    return max((chosen.tolerances.get(kind, 1e-5) for kind in floating_types(model)), default=1e-5)


def gated(model: nn.Module) -> Refusal | None:
    """The refusal for the first gate that is still in a model; None if there is none."""
    found = next((path for path, module in model.named_modules() if isinstance(module, ChannelGate)), None)
    return None if found is None else Refusal(found, "is still a gate")
