"""Mean and covariance of rows of features, in one pass, in float64.

Shape letters: R rows, F features.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["Covariance"]

_CHUNK = 2**23  # elements turned to float64 at once


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
        self.scatter = torch.zeros(features, features, dtype=torch.float64, device=place)

    def update(self, rows: Tensor, weights: Tensor | None = None) -> None:
        """Add rows (R, F), each counted `weights` (R,) times."""
        step = max(1, _CHUNK // max(1, rows.shape[1]))
        for start in range(0, len(rows), step):
            some = None if weights is None else weights[start : start + step].to(self.mean)
            self._update(rows[start : start + step].to(self.mean), some)

    def _update(self, rows: Tensor, weights: Tensor | None) -> None:
        self.count += len(rows)
        total = float(len(rows) if weights is None else weights.sum())
        if not total:
            return
        mean = rows.mean(0) if weights is None else (weights @ rows) / total
        centred = rows - mean
        scaled = centred if weights is None else centred * weights[:, None]
        shift, before = mean - self.mean, self.weight
        self.weight = before + total
        self.scatter.addmm_(scaled.t(), centred)
        self.scatter.addr_(shift, shift, alpha=before * total / self.weight)
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
        shift, before = other.mean.to(self.mean) - self.mean, self.weight
        self.weight = before + other.weight
        self.scatter += other.scatter.to(self.scatter)
        self.scatter.addr_(shift, shift, alpha=before * other.weight / self.weight)
        self.mean += shift * (other.weight / self.weight)

    def part(self, start: int) -> Covariance:
        """The statistics of only the features from `start` on."""
        found = Covariance(0, self.mean.device)
        found.count, found.weight = self.count, self.weight
        found.mean, found.scatter = self.mean[start:].clone(), self.scatter[start:, start:].clone()
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
        made.scatter.copy_(state["scatter"])
        return made

    @property
    def covariance(self) -> Tensor:
        """The covariance (F, F); zeros before any row."""
        return self.scatter / max(self.weight, 1e-300)

    @property
    def finite(self) -> bool:
        """True if all sums are finite. On a GPU, this call waits for the device."""
        return bool(torch.isfinite(self.scatter.sum() + self.mean.sum()))
