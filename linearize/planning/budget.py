"""What a user asks for, checked before any work begins."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from numbers import Real
from typing import Any

from torch import Tensor

from linearize.errors import DataError, UsageError
from linearize.families.option import MEASURES, Measure

__all__ = ["Budget", "check_data", "is_number", "read_budget"]


@dataclass(frozen=True)
class Budget:
    """What may remain of a cost.

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
    """The one budget that is given; None if there is none.

    Raises:
        UsageError: more than one is given, or a value is out of range.

    Example:
        >>> read_budget(speedup=2, latency=None, flops=None)
        Budget(measure='latency', fraction=0.5)
    """
    given = {name: value for name, value in {**fractions, "speedup": speedup}.items() if value is not None}
    if len(given) > 1:
        raise UsageError("compress", f"found {len(given)} budgets: {', '.join(given)}", "Pass exactly one.")
    for name, value in given.items():
        number = _number(name, value)
        if name == "speedup":
            if not 1 <= number < math.inf:
                raise UsageError("speedup", f"found {value}", "Pass a factor of at least 1, such as 1.5.")
            return Budget("latency", 1 / number)
        if not 0 < number <= 1:
            found = f"found {value}"
            raise UsageError(name, found, "Pass a fraction of the original's, above 0 and up to 1.")
        return next(Budget(measure, number) for measure in MEASURES if measure == name)
    return None


def _number(name: str, value: Any) -> float:
    if not is_number(value):
        raise UsageError(name, f"found {value!r}", "Pass a number.")
    return float(value)


def is_number(value: Any) -> bool:
    """Whether a value is a real number, of Python or NumPy, and no bool."""
    return isinstance(value, Real) and not isinstance(value, bool)


def check_data(data: Any) -> None:
    """Data must be batches that can be read again and again.

    Raises:
        DataError: it cannot be iterated, or only once.
    """
    if isinstance(data, Iterator):
        found = f"found a {type(data).__name__}, which can be read only once"
        raise DataError("data", found, "Pass a list of batches or a DataLoader, for instance list(batches).")
    if isinstance(data, str | bytes | dict | Tensor) or not hasattr(data, "__iter__"):
        remedy = "Pass an iterable of batches: tensors, tuples (inputs, labels), or dicts of keyword arguments."
        raise DataError("data", f"found a {type(data).__name__}", remedy)
