"""Moments of an activation's input and output, summed batch by batch, and the straight line that follows from them.

Shape letters: C channels of a gate, R rows (every token or pixel of every sample).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["Moments", "SiteCalibration"]

_TENSORS = ("mean_x", "mean_h", "xx", "hh", "xh", "moved", "size")
_CHUNK = 2**20  # elements turned to float64 at once


@dataclass(frozen=True)
class SiteCalibration:
    """The calibration of one site. Every tensor is float64 (C,), on the CPU.

    Attributes:
        count: number of rows seen. It is 0 if no batch reached the gate; then nothing was fitted.
        slope, intercept: the least-squares line; for the gate factor of a gated linear unit, (0, mean of h).
        residual: mean squared difference between the line and h.
        unexplained: the residual as a share of the variance of h, in [0, 1]. For gated units, whose line is constant,
            it is a share of the mean square of h. It is 0 where h is constant.
        mean_input, mean_output: means of x and h.
    """

    count: int
    slope: Tensor
    intercept: Tensor
    residual: Tensor
    unexplained: Tensor
    mean_input: Tensor
    mean_output: Tensor

    def to_dict(self) -> dict[str, Any]:
        """The same as plain data, ready for JSON: lists instead of tensors."""
        return {name: v.tolist() if isinstance(v, Tensor) else v for name, v in vars(self).items()}


class Moments:
    """Count, means and central second moments of x and h per channel, in float64, merged chunk by chunk.

    Central moments of chunks are merged by the rule of Chan, Golub and LeVeque (1979): a large mean costs no
    digits.

    Examples:
        >>> moments = Moments(1)
        >>> moments.update(torch.tensor([[1.0], [3.0]]), torch.tensor([[1.0], [3.0]]))
        >>> moments.count, moments.mean_x.item(), moments.xx.item()
        (2, 2.0, 2.0)
    """

    def __init__(self, channels: int, device: torch.device | str = "cpu") -> None:
        self.count = 0
        zeros = torch.zeros(7, channels, dtype=torch.float64, device=device)
        self.mean_x, self.mean_h, self.xx, self.hh, self.xh = zeros[:5].unbind()
        # Largest |x - h| and |h|: whether a channel is exactly the identity, or dead, needs no tolerance.
        self.moved, self.size = zeros[5:].unbind()

    def update(self, x: Tensor, h: Tensor) -> None:
        """Add rows of x and h, both (R, C)."""
        rows = max(1, _CHUNK // max(1, x.shape[1]))
        for some_x, some_h in zip(x.split(rows), h.split(rows), strict=True):
            if len(some_x):
                self._update(some_x.to(self.xx), some_h.to(self.xx))

    def _update(self, x: Tensor, h: Tensor) -> None:
        count, old = len(x), self.count
        mean_x, mean_h = x.mean(0), h.mean(0)
        self.moved = torch.maximum(self.moved, (x - h).abs().amax(0))
        self.size = torch.maximum(self.size, h.abs().amax(0))
        x, h = x - mean_x, h - mean_h
        dx, dh = mean_x - self.mean_x, mean_h - self.mean_h
        self._add(count, (x * x).sum(0), (h * h).sum(0), (x * h).sum(0), dx, dh, old)

    def merge(self, other: Moments) -> None:
        """Add the rows that another object has seen. Either may have seen none."""
        if not other.count:
            return
        count, old = other.count, self.count
        self.moved = torch.maximum(self.moved, other.moved.to(self.moved))
        self.size = torch.maximum(self.size, other.size.to(self.size))
        dx, dh = other.mean_x.to(self.xx) - self.mean_x, other.mean_h.to(self.xx) - self.mean_h
        self._add(count, other.xx.to(self.xx), other.hh.to(self.xx), other.xh.to(self.xx), dx, dh, old)

    def _add(self, count: int, xx: Tensor, hh: Tensor, xh: Tensor, dx: Tensor, dh: Tensor, old: int) -> None:
        """Add central moments of `count` rows whose means are (dx, dh) away."""
        self.count = total = old + count
        weight = old * count / total
        self.xx = self.xx + xx + weight * dx * dx
        self.hh = self.hh + hh + weight * dh * dh
        self.xh = self.xh + xh + weight * dx * dh
        self.mean_x = self.mean_x + dx * (count / total)
        self.mean_h = self.mean_h + dh * (count / total)

    def state(self) -> dict[str, Any]:
        """Everything, as plain values and tensors; `restore` takes it back."""
        return {"count": self.count, **{name: getattr(self, name) for name in _TENSORS}}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Restore the result of `state`."""
        self.count = state["count"]
        for name in _TENSORS:
            setattr(self, name, state[name].to(self.xx))

    @property
    def finite(self) -> Tensor:
        """A bool tensor without axes: True if everything is finite."""
        return torch.isfinite(self.xx + self.hh + self.xh).all()

    def fit(self, *, constant: bool = False) -> SiteCalibration:
        """The least-squares line of every channel, or its best `constant`."""
        count = max(1, self.count)
        # Below this the spread of x is the rounding of its mean: a constant input has a constant output.
        flat = self.xx <= count * (1e-12 * self.mean_x.abs()) ** 2
        slope = torch.where(flat, 0.0, self.xh / torch.where(flat, 1.0, self.xx))
        identity, dead = self.moved == 0, self.size == 0
        slope = slope.masked_fill(identity, 1).masked_fill(dead, 0)
        if constant:
            slope, identity = torch.zeros_like(slope), torch.zeros_like(identity)
        intercept = (self.mean_h - slope * self.mean_x).masked_fill(identity | dead, 0)
        left = self.hh - slope * self.xh
        rounding = left <= 1e-14 * (self.hh + self.mean_h.square() * count * 1e-14)
        left = left.masked_fill(identity | dead | rounding, 0)
        energy = self.hh + (count * self.mean_h.square() if constant else 0)
        unexplained = left / torch.where(left > 0, energy, 1.0)
        if not self.count:
            unexplained = torch.ones_like(unexplained)  # nothing is known, so nothing is promised
        values = (slope, intercept, left / count, unexplained.clamp(0, 1), self.mean_x, self.mean_h)
        return SiteCalibration(self.count, *(value.cpu() for value in values))
