"""The budget that a user asks for, checked before any work begins."""

from __future__ import annotations

from dataclasses import dataclass

from linearize import checks
from linearize.errors import UsageError
from linearize.families.option import MEASURES, Measure

__all__ = ["Budget", "read_budget"]


@dataclass(frozen=True)
class Budget:
    """The share of a cost that may remain.

    Attributes:
        measure: "latency", "flops", "params" or "activations".
        fraction: of the original's, in (0, 1].
    """

    measure: Measure
    fraction: float

    def __str__(self) -> str:
        name = {"flops": "FLOPs", "params": "parameters", "activations": "nonlinear units"}.get(self.measure)
        return f"{name or self.measure} at {self.fraction:.3g} of the original's"


def read_budget(*, speedup: float | None, **fractions: float | None) -> Budget | None:
    """The one budget that was given; None if there is none.

    Raises:
        UsageError: more than one is given, or a value is out of range.

    Examples:
        >>> read_budget(speedup=2, latency=None, flops=None)
        Budget(measure='latency', fraction=0.5)
    """
    given = {name: value for name, value in {**fractions, "speedup": speedup}.items() if value is not None}
    if len(given) > 1:
        raise UsageError("compress", f"found {len(given)} budgets: {', '.join(given)}", "Pass exactly one.")
    for name, value in given.items():
        if name == "speedup":
            return Budget("latency", 1 / checks.number("speedup", value, least=1))
        number = checks.share(name, value, "fraction of the original's", positive=True)
        return next(Budget(measure, number) for measure in MEASURES if measure == name)
    return None
