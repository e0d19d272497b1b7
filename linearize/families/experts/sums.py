"""What a pass over data found about a mixture: sums that merge exactly.

Shape letters: E experts, M channels of an expert, O of what comes out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from linearize.algebra.covariance import Covariance

__all__ = ["ExpertSums"]

_TENSORS = ("rows", "norms", "change", "felt", "power", "sensitivity")
_NUMBERS = ("tokens", "looked", "energy", "samples")


class ExpertSums:
    """Sums over tokens.

    Attributes:
        tokens: all that were seen.
        looked: those that experts were taken from, to see what changes.
        samples: what the gradients are summed over.
        energy: squares of gradients, of the tokens looked at.
        rows: (E,) tokens that pick each expert, of all that were seen.
        norms: (E,) sums of weight times norm of what an expert gives.
        change: (E, E) products of what changes in the output without one expert, and without another.
        felt: (E, E) the same, of what the gradient feels of it.
        power: (E,) sums of squared weights.
        sensitivity: (O, O) products of gradients.
        hidden: by expert, its channels, weighted.
    """

    def __init__(self, experts: int, outputs: int, channels: int = 0, device: torch.device | str = "cpu") -> None:
        place = "cpu" if torch.device(device).type == "mps" else device
        kind: dict[str, Any] = {"dtype": torch.float64, "device": place}
        self.tokens = self.looked = self.energy = self.samples = 0.0
        self.rows, self.norms, self.power = (torch.zeros(experts, **kind) for _ in range(3))
        self.change, self.felt = torch.zeros(experts, experts, **kind), torch.zeros(experts, experts, **kind)
        self.sensitivity = torch.zeros(outputs, outputs, **kind)
        self.hidden = [Covariance(channels, place) for _ in range(experts if channels else 0)]

    def merge(self, other: ExpertSums) -> None:
        """Take in what was found on other batches."""
        for name in _NUMBERS:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for name in _TENSORS:
            getattr(self, name).add_(getattr(other, name).to(self.rows.device))
        for mine, theirs in zip(self.hidden, other.hidden, strict=True):
            mine.merge(theirs)

    @property
    def finite(self) -> bool:
        """Whether all sums are finite."""
        return all(bool(getattr(self, name).isfinite().all()) for name in _TENSORS) and all(
            covariance.finite for covariance in self.hidden
        )

    def state(self) -> dict[str, Any]:
        """Everything, as plain values and tensors."""
        found: dict[str, Any] = {name: getattr(self, name) for name in (*_NUMBERS, *_TENSORS)}
        return {**found, "hidden": [covariance.state() for covariance in self.hidden]}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take what `state` gave."""
        for name in _NUMBERS:
            setattr(self, name, state[name])
        for name in _TENSORS:
            setattr(self, name, state[name].to(self.rows))
        self.hidden = [Covariance.of(some, self.rows.device) for some in state["hidden"]]
