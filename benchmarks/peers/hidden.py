"""Hidden channels between two maps of a model, found by the names that timm and transformers use, and removed by hand.

Shape letters: C hidden channels, K that stay, O outputs of the consumer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Hidden", "cut", "hidden_of"]

# Names within one module: producers, what works on each channel, the consumer, and the norm behind the consumer.
_PATTERNS: tuple[tuple[tuple[str, ...], tuple[str, ...], str, str | None], ...] = (
    (("fc1",), (), "fc2", None),
    (("conv_pw",), ("bn1", "conv_dw", "bn2"), "conv_pwl", "bn3"),
    (("conv_head",), ("bn2",), "classifier", None),
    (("gate_proj", "up_proj"), (), "down_proj", None),
    (("intermediate.dense",), (), "output.dense", None),
)


@dataclass(frozen=True)
class Hidden:
    """A stretch of hidden channels.

    Attributes:
        producers: paths of the maps whose outputs they are; two for a gated unit.
        between: paths of norms and depthwise convolutions in between.
        consumer: path of the map that reads them, each position by itself.
        norm: path of the BatchNorm behind a consumer without bias; None if the consumer has one, or nothing has.
    """

    producers: tuple[str, ...]
    between: tuple[str, ...]
    consumer: str
    norm: str | None = None


def hidden_of(model: nn.Module) -> tuple[Hidden, ...]:
    """All stretches of hidden channels of FFNs, gated FFNs, inverted residuals and a convolutional head."""
    known = dict(model.named_modules())
    found = []
    for path in known:
        for producers, between, consumer, norm in _PATTERNS:
            full = {name: f"{path}.{name}".lstrip(".") for name in (*producers, *between, consumer, norm) if name}
            if all(name in known for name in full.values()):
                after = None if norm is None else full[norm]
                made = tuple(full[name] for name in producers), tuple(full[name] for name in between)
                found.append(Hidden(*made, full[consumer], after))
    return tuple(found)


def channels_of(model: nn.Module, hidden: Hidden) -> int:
    """C."""
    producer: Any = model.get_submodule(hidden.producers[0])
    return int(producer.weight.shape[0])


@torch.no_grad()
def cut(model: nn.Module, hidden: Hidden, keep: Tensor) -> None:
    """Remove all channels but some, in place; what the consumer computes from those is left as it was.

    Args:
        model: with plain layers of torch.
        hidden: which channels.
        keep: indices of those that stay (K,).
    """
    for path in (*hidden.producers, *hidden.between):
        _narrow_outputs(model.get_submodule(path), keep)
    consumer: Any = model.get_submodule(hidden.consumer)
    consumer.weight = nn.Parameter(consumer.weight[:, keep].clone())
    setattr(consumer, "in_features" if isinstance(consumer, nn.Linear) else "in_channels", len(keep))


def _narrow_outputs(module: Any, keep: Tensor) -> None:
    for name in ("weight", "bias", "running_mean", "running_var"):
        held = getattr(module, name, None)
        if held is not None:
            some = held[keep].clone()
            setattr(module, name, nn.Parameter(some) if isinstance(held, nn.Parameter) else some)
    names: Sequence[str] = ("num_features",)
    if isinstance(module, nn.Linear):
        names = ("out_features",)
    elif isinstance(module, nn.Conv2d):
        names = ("out_channels",) if module.groups == 1 else ("out_channels", "in_channels", "groups")
    for name in names:
        setattr(module, name, len(keep))
