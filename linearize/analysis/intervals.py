"""Intervals: the range of values of each element of a tensor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from linearize.graph.capture import CONSTANT, Capture, shape

# Falling, then rising: the greatest value of an interval is at one of its ends, the least nowhere below this.
_VALLEYS = {"gelu": -0.17, "silu": -0.2785, "swish": -0.2785, "hardswish": -0.375001, "mish": -0.3089}


@dataclass(frozen=True)
class Interval:
    """Least and greatest value of each element of a tensor, float64."""

    low: Tensor
    high: Tensor

    @property
    def size(self) -> Tensor:
        """The greatest absolute value."""
        return torch.maximum(self.low.abs(), self.high.abs())

    def widened(self, by: Tensor | float) -> Interval:
        """The interval with some more room on both sides."""
        return Interval(self.low - by, self.high + by)


Value = Interval | list[Interval] | None


def _valley(name: str, box: Interval, ends: Interval) -> Interval:
    """An activation that falls and then rises, from its values at the ends of an interval."""
    bottom = torch.full_like(ends.low, _VALLEYS[name])
    found = Interval(torch.where(box.low >= 0, ends.low, bottom), torch.maximum(ends.low, ends.high))
    return found.widened(16 * _EPS * (1 + found.size))


def _usable(value: Value) -> bool:
    """Numbers in float64 without NaN; anything else is as good as unbounded."""
    parts = value if isinstance(value, list) else [value]
    ends = [end for part in parts if part is not None for end in (part.low, part.high)]
    return bool(ends) and all(end.dtype == torch.float64 and not bool(end.isnan().any()) for end in ends)


def per_channel(interval: Interval, axis: int) -> tuple[Tensor, Tensor]:
    """Least and greatest value of each channel: two tensors (C,)."""
    low, high = (t.movedim(axis, 0).flatten(1) for t in (interval.low, interval.high))
    return low.amin(1), high.amax(1)


def box_of(node_shapes: Sequence[tuple[int, ...]], box: Any) -> list[Interval]:
    """A box for inputs of some shapes: one pair (low, high) of numbers or tensors for all, or a pair for each."""
    pairs = list(box) if len(box) == len(node_shapes) and all(isinstance(p, (tuple, list)) for p in box) else None
    pairs = [box] * len(node_shapes) if pairs is None else pairs
    made = []
    for sizes, (low, high) in zip(node_shapes, pairs, strict=True):
        ends = [torch.as_tensor(end, dtype=torch.float64).expand(sizes).clone() for end in (low, high)]
        made.append(Interval(ends[0], ends[1]))
    return made


def input_shapes(captured: Capture) -> list[tuple[int, ...]]:
    """Shapes of the floating inputs of a captured model."""
    found = []
    for node in captured.graph.nodes:
        value = node.meta.get("val")
        if node.op == "placeholder" and CONSTANT not in node.meta and isinstance(value, Tensor):
            sizes = shape(node)
            if sizes is not None and value.is_floating_point():
                found.append(sizes)
    return found


_EPS = torch.finfo(torch.float64).eps
