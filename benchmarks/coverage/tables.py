"""What the sweep's rows add up to."""

from __future__ import annotations

import ast
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from benchmarks.coverage.pool import Record
from benchmarks.coverage.row import EQUAL, FINE, META, NOTHING, RUNS_NOT, UNREACHED

OTHER = "other"


def verdict(row: Record) -> str:
    """Equal, nothing to gate, meta, does not run, or other: one of six."""
    result = str(row["result"])
    if result in FINE or result == META:
        return result
    return RUNS_NOT if result.startswith(RUNS_NOT) else OTHER


@dataclass
class Totals:
    """Sums over a group of rows."""

    models: int
    results: Counter[str]
    activations: int
    aside: int
    gated: int
    collapsible: int
    error: float

    @property
    def runs(self) -> int:
        """Models whose own forward runs."""
        return self.models - self.results[RUNS_NOT]

    @property
    def fine(self) -> int:
        """Models that end in "equal" or "nothing to gate"."""
        return self.results[EQUAL] + self.results[NOTHING] + self.results[UNREACHED]


def totals(rows: Sequence[Record]) -> Totals:
    """Add up a group of rows."""
    errors = [value for row in rows if not math.isnan(value := number(row["error"]))]
    keys = ("activations", "gates_aside", "gated", "collapsible")
    activations, aside, gated, collapsible = (sum(int(row[key] or 0) for row in rows) for key in keys)
    results, error = Counter(map(verdict, rows)), max(errors, default=math.nan)
    return Totals(len(rows), results, activations, aside, gated, collapsible, error)


def smallest_of(sizes: Iterable[Record]) -> dict[str, str]:
    """The model with the fewest parameters of every family, by family."""
    best: dict[str, tuple[int, str]] = {}
    for record in sizes:
        found = (int(record["parameters"]), str(record["name"]))
        best[str(record["family"])] = min(best.get(str(record["family"]), found), found)
    return {family: name for family, (_, name) in best.items()}


def by_family(rows: Sequence[Record]) -> dict[str, list[Record]]:
    """The rows of each family, in order of its name."""
    found: defaultdict[str, list[Record]] = defaultdict(list)
    for row in rows:
        found[row["family"]].append(row)
    return dict(sorted(found.items()))


def reasons(rows: Sequence[Record]) -> list[tuple[str, int, int]]:
    """Why activations are not gated or not collapsible: (reason, activations, models), the most frequent first."""
    counts: Counter[str] = Counter()
    models: Counter[str] = Counter()
    for row in rows:
        found: Counter[str] = Counter()
        for reason, count in ast.literal_eval(row["reasons"] or "{}").items():
            found[readable(reason)] += count
        counts.update(found)
        models.update(found.keys())
    return [(reason, count, models[reason]) for reason, count in counts.most_common()]


def readable(reason: str) -> str:
    """A reason that reads well without the module path that was in it, and without what was tried second.

    Example:
        >>> readable("the forward of cannot be rewritten: it branches; 1 calls in the source of its methods run twice")
        'the forward that calls it cannot be rewritten: it branches'
    """
    first = reason.partition("; ")[0]
    first = first.replace("the forward of cannot be", "the forward that calls it cannot be")
    return {"is shared with": "its module is shared with another place"}.get(first, first)


def convert_ratios(rows: Sequence[Record]) -> list[float]:
    """Seconds of `convert` over those of one forward pass and one capture of the same model, sorted."""
    found = []
    for row in rows:
        convert, export = number(row["seconds_convert"]), number(row["seconds_export"])
        if convert > 0 and export > 0:
            found.append(convert / (number(row["seconds_forward"]) + export))
    return sorted(found)


def number(text: str) -> float:
    """A cell as a number; NaN if it is empty."""
    return float(text) if text else math.nan


def share(part: int, whole: int) -> str:
    """A count, and what percentage it is of another."""
    return f"{part} ({100 * part / whole:.1f}%)" if whole else "0"


def table(heads: Sequence[str], lines: Sequence[Sequence[object]]) -> str:
    """A Markdown table."""
    rows = [heads, ["---"] * len(heads), *lines]
    return "\n".join(f"| {' | '.join(cell(item) for item in row)} |" for row in rows)


def cell(item: object, length: int = 260) -> str:
    """Text that does not break a table."""
    text = " ".join(str(item).split()).replace("|", "/").replace("<", "&lt;")
    return text if len(text) <= length else f"{text[: length - 1]}…"
