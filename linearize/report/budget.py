"""The budget that was asked for and what was reached, as a sentence and as data."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["MEASURE_NAMES", "Outcome"]

MEASURE_NAMES = {
    "flops": "FLOPs",
    "params": "parameters",
    "activations": "nonlinear units",
    "memory": "weights and cache",
    "decode": "time per token",
    "prefill": "time to first token",
}
_FASTER = ("decode",)  # asked for as a factor, not as a fraction


@dataclass(frozen=True)
class Outcome:
    """A budget and what was reached. Fractions are of the original's cost.

    Attributes:
        measure: "latency", "flops", "params", "activations", "memory", "decode" or "prefill"; "together" of several
            budgets, whose fractions are shares of what is allowed, of the budget of which most is used.
        asked: the fraction that may remain.
        predicted: the fraction that the plan predicted.
        reached: the fraction that remains, counted, or measured for times; None after a dry run.
        least: the smallest fraction that any plan here can reach, as predicted.
        loss: predicted error of the model's output, before any fine-tuning.
        uniform_loss: the same for the best plan that makes one choice for all sites; None if none meets the budget, or
            there are several budgets.
        met: whether the budget is met, or all of several; None after a dry run.
        runtime: where a latency was measured, such as "ONNX Runtime 1.32.0"; None for PyTorch.
        parts: of several budgets, each by itself.
        at: where the model is served, such as "batch 1, context 512"; "" for budgets that do not ask.
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
    parts: tuple[Outcome, ...] = ()
    at: str = ""

    def to_dict(self) -> dict[str, Any]:
        """The same as plain data, ready for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        if self.parts:
            return "; ".join(map(str, self.parts))
        name = (
            MEASURE_NAMES.get(self.measure, self.measure)
            + (f" ({self.at})" if self.at else "")
            + (f" in {self.runtime}" if self.runtime else "")
        )
        asked = f"{self.asked:.3g}"
        if self.reached is None:
            if self.predicted > self.asked * (1 + 1e-9):
                return f"CANNOT BE MET: {name} at {asked}; the least that can be reached is {self.least:.3g}"
            return f"{name} at {asked} of the original's: {self.predicted:.3g} predicted"
        faster = f" ({1 / self.reached:.2f} x as fast)" if self.measure in _FASTER and self.reached else ""
        if self.met:
            return f"{name} at {asked} of the original's: {self.reached:.3g} reached{faster}"
        return (
            f"NOT MET: {name} at {asked} of the original's asked, {self.reached:.3g} reached{faster} "
            f"(least that can be reached, as predicted: {self.least:.3g})"
        )
