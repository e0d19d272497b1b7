"""The budgets that a user asks for, checked before any work begins."""

from __future__ import annotations

from dataclasses import dataclass

from linearize import checks
from linearize.errors import UsageError
from linearize.families.option import MEASURES, Measure
from linearize.report.budget import MEASURE_NAMES

__all__ = ["SERVED", "TIMED", "Budget", "read_budgets"]

TIMED: tuple[Measure, ...] = ("latency", "decode", "prefill")
"""What is measured with a clock; everything else is counted."""

SERVED: tuple[Measure, ...] = ("decode", "prefill", "memory")
"""What only models that generate have, at a batch size and a context."""


@dataclass(frozen=True)
class Budget:
    """The share of a cost that may remain.

    Attributes:
        measure: "latency", "flops", "params", "activations", "memory", "decode" or "prefill".
        fraction: of the original's, in (0, 1].
    """

    measure: Measure
    fraction: float

    def __str__(self) -> str:
        return f"{MEASURE_NAMES.get(self.measure, self.measure)} at {self.fraction:.3g} of the original's"


def read_budgets(
    *, speedup: float | None = None, decode: float | None = None, **fractions: float | None
) -> tuple[Budget, ...]:
    """The budgets that were given; none if there are none.

    Raises:
        UsageError: two say something of the same cost, one counts only for itself, or a value is out of range.

    Examples:
        >>> read_budgets(speedup=2, latency=None, flops=None)
        (Budget(measure='latency', fraction=0.5),)
        >>> [str(budget) for budget in read_budgets(decode=1.25, memory=0.7)]
        ["weights and cache at 0.7 of the original's", "time per token at 0.8 of the original's"]
    """
    given = {
        name: value for name, value in {**fractions, "speedup": speedup, "decode": decode}.items() if value is not None
    }
    if {"latency", "speedup"} <= given.keys():
        found = "found 2 budgets for the latency: latency, speedup"
        raise UsageError("compress", found, "Pass one of them: speedup=2 is latency=0.5.")
    if "activations" in given and len(given) > 1:
        found = f"found {len(given)} budgets: {', '.join(given)}"
        raise UsageError("compress", found, "Pass activations= by itself: its options are others.")
    wanted: dict[str, float] = {}
    for name, value in given.items():
        if name in ("speedup", "decode"):
            wanted["latency" if name == "speedup" else name] = 1 / checks.number(name, value, least=1)
        else:
            wanted[name] = checks.share(name, value, "fraction of the original's", positive=True)
    return tuple(Budget(measure, wanted[measure]) for measure in MEASURES if measure in wanted)
