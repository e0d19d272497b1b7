"""What a pass over data sums up for a place: the covariance of what is read and given there, and its sensitivity."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from linearize.algebra.covariance import Covariance

__all__ = ["Gathered"]


@dataclass(kw_only=True)
class Gathered:
    """Sums that a place carries. `state` keeps them for resuming, and `merge` adds those of other batches.

    Shape letter: O outputs of the place.

    Attributes:
        rows: covariance of the rows that the family looks at.
        sensitivity: G of the output, (O, O).
        samples: what the sensitivity is a sum over.

    Examples:
        >>> ours, others = Gathered(samples=2.0), Gathered(samples=3.0, sensitivity=torch.eye(2))
        >>> ours.merge(others)
        >>> ours.samples, ours.sensitivity.trace().item()
        (5.0, 2.0)
    """

    rows: Covariance | None = None
    sensitivity: Tensor | None = None
    samples: float = 0.0

    def state(self) -> dict[str, Any]:
        """The sums, as plain values and tensors. `restore` reads them back."""
        rows = None if self.rows is None else self.rows.state()
        return {"samples": self.samples, "rows": rows, "sensitivity": self.sensitivity}

    def restore(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Restore the result of `state`."""
        self.rows = None if state["rows"] is None else Covariance.of(state["rows"], device)
        sensitivity: Tensor | None = state["sensitivity"]
        self.sensitivity = None if sensitivity is None else sensitivity.to(device)
        self.samples = state["samples"]

    def merge(self, other: Self) -> None:
        """Add the sums of another one, from other batches."""
        if other.rows is not None:
            if self.rows is None:
                self.rows = other.rows
            else:
                self.rows.merge(other.rows)
        if other.sensitivity is not None:
            mine = 0.0 if self.sensitivity is None else self.sensitivity
            self.sensitivity = other.sensitivity + mine
        self.samples += other.samples
