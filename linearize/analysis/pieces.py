"""Where an activation is a straight line, and which channels always stay on one line."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

HOMOGENEOUS = frozenset({"relu", "leakyrelu", "prelu"})


@dataclass(frozen=True)
class Line:
    """The line `slope * x + intercept` that a channel follows while its input stays in one piece of the activation."""

    slope: float
    intercept: float


def line_on(activation: nn.Module, name: str, low: float, high: float) -> Line | None:
    """The straight line that an activation is on [low, high]; None if it is none.

    Args:
        activation: the module.
        name: what it is called, in lower case.
        low: lower end of the interval; may be infinite.
        high: upper end.

    Examples:
        >>> line_on(nn.ReLU6(), "relu6", 1.0, 5.0)
        Line(slope=1.0, intercept=0.0)
        >>> line_on(nn.GELU(), "gelu", 1.0, 5.0) is None
        True
    """
    if not low <= high:
        return None
    if low == high and math.isfinite(low):  # a constant: whatever the activation
        return Line(0.0, _at(activation, low))
    for start, stop in _pieces(activation, name.replace("_", "")):
        if start <= low and high <= stop:
            a = start + 1 if math.isfinite(start) else stop - 2
            b = stop - 1 if math.isfinite(stop) and not math.isfinite(start) else a + 1
            if math.isfinite(start) and math.isfinite(stop):
                a, b = start, stop
            left, right = _at(activation, a), _at(activation, b)
            slope = (right - left) / (b - a)
            return Line(slope, left - slope * a)
    return None


@torch.no_grad()
def _at(activation: nn.Module, x: float) -> float:
    parameter = next(activation.parameters(), None)
    device = parameter.device if parameter is not None else None
    return float(activation(torch.full((1, 1), x, dtype=torch.float64, device=device)))


def _pieces(activation: nn.Module, name: str) -> Sequence[tuple[float, float]]:
    """Intervals on which an activation is straight; the curved parts are left out."""
    inf = math.inf
    if name in HOMOGENEOUS:
        if sum(p.numel() for p in activation.parameters()) > 1:
            return []
        return [(-inf, 0.0), (0.0, inf)]
    if name == "relu6":
        return [(-inf, 0.0), (0.0, 6.0), (6.0, inf)]
    if name == "hardtanh":
        options: Any = getattr(activation, "options", {})
        low = float(getattr(activation, "min_val", options.get("min_val", -1)))
        high = float(getattr(activation, "max_val", options.get("max_val", 1)))
        return [(-inf, low), (low, high), (high, inf)]
    if name == "hardswish":
        return [(-inf, -3.0), (3.0, inf)]
    if name == "hardsigmoid":
        return [(-inf, -3.0), (-3.0, 3.0), (3.0, inf)]
    return []


def homogeneous(activation: nn.Module, name: str) -> bool:
    """True if `act(s x) = s act(x)` for every s > 0, with the same activation for all channels."""
    return name.replace("_", "") in HOMOGENEOUS and sum(p.numel() for p in activation.parameters()) <= 1
