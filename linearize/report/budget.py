"""The budget that was asked for and what was reached, as a sentence and as data."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["Outcome"]

_NAMES = {"flops": "FLOPs", "params": "parameters", "activations": "nonlinear units", "latency": "latency"}


@dataclass(frozen=True)
class Outcome:
    """A budget and what was reached. Fractions are of the original's cost.

    Attributes:
        measure: "latency", "flops", "params" or "activations".
        asked: the fraction that may remain.
        predicted: the fraction that the plan predicted.
        reached: the fraction that remains, counted, or measured for latency; None after a dry run.
        least: the smallest fraction that any plan here can reach, as predicted.
        loss: predicted error of the model's output, before any fine-tuning.
        uniform_loss: the same for the best plan that makes one choice for all sites; None if none meets the budget.
        met: whether the budget is met; None after a dry run.
        runtime: where a latency was measured, such as "ONNX Runtime 1.32.0"; None for PyTorch.
    """

    measure: str
    asked: float
    predicted: float
    reached: float | None
    least: float
    loss: float
    uniform_loss: float | None
    met: bool | None
    runtime: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """The same as plain data, ready for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        name = _NAMES.get(self.measure, self.measure) + (f" in {self.runtime}" if self.runtime else "")
        if self.reached is None:
            if self.predicted > self.asked * (1 + 1e-9):
                return f"CANNOT BE MET: {name} at {self.asked:.3g}; the least that can be reached is {self.least:.3g}"
            return f"{name} at {self.asked:.3g} of the original's: {self.predicted:.3g} predicted"
        if self.met:
            return f"{name} at {self.asked:.3g} of the original's: {self.reached:.3g} reached"
        return (
            f"NOT MET: {name} at {self.asked:.3g} of the original's asked, {self.reached:.3g} reached "
            f"(least that can be reached, as predicted: {self.least:.3g})"
        )
