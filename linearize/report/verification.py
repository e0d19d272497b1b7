"""The result of comparing two models, as data and as a table."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from linearize.text_table import render

__all__ = ["OutputError", "Verification", "worst"]


@dataclass(frozen=True)
class OutputError:
    """The difference between one output of the candidate and of the reference.

    Attributes:
        name: path of the output, for example "logits" or "hidden_states.3"; "output" if there is only one.
        max_error: max |a - b| / max |a| over all batches; a is the reference's output.
        rms_error: ||a - b|| / ||a|| over all batches.
        tolerance: the largest value that both errors may have; 0 for integers, which must be equal.
        reason: if it failed for another reason than the size of the errors, this reason; else None.
    """

    name: str
    max_error: float
    rms_error: float
    tolerance: float
    reason: str | None = None

    @property
    def passed(self) -> bool:
        """True if both errors are within the tolerance. NaN never passes."""
        return self.reason is None and self.max_error <= self.tolerance and self.rms_error <= self.tolerance


@dataclass(frozen=True)
class Verification:
    """The result of `verify`. It is true if every output passed, and prints as a table.

    Attributes:
        outputs: one entry per output.
        ignored: outputs that hold no numbers and were not compared, for example caches.
    """

    outputs: tuple[OutputError, ...]
    ignored: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """True if at least one output was compared and all of them passed."""
        return bool(self.outputs) and all(output.passed for output in self.outputs)

    @property
    def max_error(self) -> float:
        """The largest `max_error` of all outputs; NaN if any is NaN."""
        return worst(output.max_error for output in self.outputs)

    @property
    def rms_error(self) -> float:
        """The largest `rms_error` of all outputs; NaN if any is NaN."""
        return worst(output.rms_error for output in self.outputs)

    def __bool__(self) -> bool:
        return self.passed

    def to_dict(self) -> dict[str, Any]:
        """The same as plain data. Errors that JSON cannot hold are the texts "inf" and "nan"."""
        outputs = [{**asdict(output), "passed": output.passed} for output in self.outputs]
        found = {
            "passed": self.passed,
            "max_error": self.max_error,
            "rms_error": self.rms_error,
            "outputs": [{key: _plain(value) for key, value in output.items()} for output in outputs],
            "ignored": list(self.ignored),
        }
        return {key: _plain(value) for key, value in found.items()}

    def __str__(self) -> str:
        rows = [
            [o.name, f"{o.max_error:.2e}", f"{o.rms_error:.2e}", f"{o.tolerance:.0e}", _verdict(o)]
            for o in self.outputs
        ]
        lines = [render(["output", "max error", "rms error", "tolerance", "result"], rows)]
        if self.ignored:
            lines.append(f"not compared: {', '.join(self.ignored)}")
        lines.append("the same function" if self.passed else "NOT the same function")
        return "\n".join(lines)


def worst(values: Iterable[float]) -> float:
    """The largest value, NaN if any is NaN, 0 if there is none."""
    found = list(values)
    return math.nan if any(math.isnan(value) for value in found) else max(found, default=0.0)


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _verdict(output: OutputError) -> str:
    return "ok" if output.passed else (output.reason or "too far")
