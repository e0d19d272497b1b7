"""Mean and covariance of rows of features, in one pass, summed in float64.

Products of single-precision rows are taken in float32, about the mean of their chunk, which costs no digit that the
rows have; they are summed in float64. A covariance is symmetric: only its lower half is computed.

Shape letters: R rows, F features.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["Covariance"]

_CHUNK = 2**23  # elements worked on at once
_PANEL = 512  # features whose products are taken at once


class Covariance:
    """Weighted mean (F,) and central second moment (F, F) of a stream of rows; O(F^2) memory, no rows are kept.

    Chunks are merged by the rule of Chan, Golub and LeVeque (1979), so that a large mean costs no digits.

    Args:
        features: F.
        device: where the sums live; float64 there (the CPU for MPS, which has none).

    Attributes:
        count: rows seen.
        weight: sum of their weights (each 1 by default).

    Examples:
        >>> found = Covariance(2)
        >>> found.update(torch.tensor([[1.0, 0.0], [3.0, 0.0]]))
        >>> found.count, found.mean.tolist(), found.covariance.tolist()
        (2, [2.0, 0.0], [[1.0, 0.0], [0.0, 0.0]])
    """

    def __init__(self, features: int, device: torch.device | str = "cpu") -> None:
        place = "cpu" if torch.device(device).type == "mps" else device
        self.count = 0
        self.weight = 0.0
        self.mean = torch.zeros(features, dtype=torch.float64, device=place)
        self._lower = torch.zeros(features, features, dtype=torch.float64, device=place)

    @property
    def scatter(self) -> Tensor:
        """The sum of products about the mean (F, F)."""
        found = self._lower.tril()
        found += found.tril(-1).t()  # in place: of large ones no more copies than needed
        return found

    def update(self, rows: Tensor, weights: Tensor | None = None) -> None:
        """Add rows (R, F), each counted `weights` (R,) times."""
        step = max(1, _CHUNK // max(1, rows.shape[1]))
        dtype = torch.float64 if rows.dtype == torch.float64 else torch.float32
        for start in range(0, len(rows), step):
            some = None if weights is None else weights[start : start + step].to(self.mean)
            self._update(rows[start : start + step].to(self.mean.device, dtype), some)

    def _update(self, rows: Tensor, weights: Tensor | None) -> None:
        self.count += len(rows)
        total = float(len(rows) if weights is None else weights.sum())
        if not total:
            return
        about = rows.mean(0) if weights is None else (weights.to(rows) @ rows) / total
        centred = rows - about
        scaled = centred if weights is None else centred * weights.to(rows)[:, None]
        rest = scaled.sum(0, dtype=torch.float64) / total  # of the mean, for which float32 has no digits
        self._shift(about.double() + rest - self.mean, total)
        for start in range(0, rows.shape[1], _PANEL):
            panel, left, right = self._panel(start), scaled[:, start : start + _PANEL].t(), centred[:, : start + _PANEL]
            if rows.dtype == panel.dtype:
                panel.addmm_(left, right)
            else:
                panel += left @ right

    def _panel(self, start: int) -> Tensor:
        """Some rows of the lower half."""
        return self._lower[start : start + _PANEL, : start + _PANEL]

    def _shift(self, shift: Tensor, total: float) -> None:
        """Move the mean by what further rows, of some weight in all, draw it to theirs, which is `shift` away."""
        before = self.weight
        self.weight += total
        for start in range(0, len(shift), _PANEL) if before else ():
            some, until = shift[start : start + _PANEL], shift[: start + _PANEL]
            self._panel(start).addr_(some, until, alpha=before * total / self.weight)
        self.mean += shift * (total / self.weight)

    def merge(self, other: Covariance) -> None:
        """Add the rows that another object has seen. Either may have seen none.

        Examples:
            >>> rows = torch.randn(9, 2, dtype=torch.float64)
            >>> first, second, whole = Covariance(2), Covariance(2), Covariance(2)
            >>> first.update(rows[:4]), second.update(rows[4:]), whole.update(rows)
            (None, None, None)
            >>> first.merge(second)
            >>> bool(torch.allclose(first.covariance, whole.covariance, rtol=1e-12))
            True
        """
        self.count += other.count
        if not other.weight:
            return
        self._shift(other.mean.to(self.mean) - self.mean, other.weight)
        self._lower += other._lower.to(self._lower)

    def part(self, start: int) -> Covariance:
        """The statistics of only the features from `start` on."""
        found = Covariance(0, self.mean.device)
        found.count, found.weight = self.count, self.weight
        found.mean, found._lower = self.mean[start:].clone(), self._lower[start:, start:].clone()
        return found

    def state(self) -> dict[str, Any]:
        """Everything, as plain values and tensors; `Covariance.of` makes the object again."""
        return {"count": self.count, "weight": self.weight, "mean": self.mean, "scatter": self.scatter}

    @classmethod
    def of(cls, state: Mapping[str, Any], device: torch.device | str = "cpu") -> Covariance:
        """The object whose `state` this is, on a device."""
        made = cls(len(state["mean"]), device)
        made.count, made.weight = state["count"], state["weight"]
        made.mean.copy_(state["mean"])
        made._lower.copy_(state["scatter"])
        return made

    @property
    def covariance(self) -> Tensor:
        """The covariance (F, F); zeros before any row."""
        return self.scatter.div_(max(self.weight, 1e-300))

    def taken(self) -> Tensor:
        """The covariance in the memory of the sums, which are gone afterwards: for features that fill the memory.

        Examples:
            >>> found = Covariance(2)
            >>> found.update(torch.tensor([[1.0, 0.0], [3.0, 2.0]]))
            >>> found.taken().tolist()
            [[1.0, 1.0], [1.0, 1.0]]
        """
        found, self._lower = self._lower.tril_(), self._lower.new_zeros(0, 0)
        found += found.tril(-1).t()
        return found.div_(max(self.weight, 1e-300))

    @property
    def finite(self) -> bool:
        """True if all sums are finite. On a GPU, this call waits for the device."""
        return bool(torch.isfinite(self._lower.sum() + self.mean.sum()))
