"""The page of one or several suites: each machine with its facts, each cell with the original beside the others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from linearize._version import __version__
from linearize.report.charts import in_seconds
from linearize.report.svg import strip
from linearize.report.web import data_url, page
from linearize.suite.matrix import Cell
from linearize.suite.merge import Machine, to_csv

__all__ = ["suite_page"]

_BYTES = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


def suite_page(machines: Sequence[Machine]) -> str:
    """The whole page as text."""
    return page(
        "suite.html",
        title="Measured on " + (machines[0].name if len(machines) == 1 else f"{len(machines)} machines"),
        machines=[_machine(machine) for machine in machines],
        csv_url=data_url(to_csv(machines), "text/csv"),
        footer=f"Made by linearize {__version__}",
    )


def _machine(machine: Machine) -> dict[str, Any]:
    cells = [_cell(record) for record in machine.records]
    models = [
        f"{name}: {about.get('class')}, {about.get('parameters', 0):,} parameters"
        for name, about in machine.models.items()
    ]
    return {
        "name": machine.name,
        "facts": [(name.replace("_", " "), str(value)) for name, value in machine.facts.items()],
        "models": models,
        "missing": machine.missing,
        "overviews": _overviews(machine),
        "works": [(work, [c for c in cells if c["work"] == work]) for work in dict.fromkeys(c["work"] for c in cells)],
    }


def _overviews(machine: Machine) -> list[dict[str, Any]]:
    """For each model that is compared: ratios, settings down, batch sizes across."""
    batches = list(dict.fromkeys(record["cell"]["batch"] for record in machine.records))
    others = list(machine.models)[1:]
    found = []
    for name in others:
        rows: dict[str, dict[int, Any]] = {}
        for record in machine.records:
            cell = Cell(**record["cell"])
            ratio = record["models"].get(name, {}).get("ratio")
            rows.setdefault(cell.without_batch, {})[cell.batch] = ratio
        lines = [(setting, [_shown(row.get(batch)) for batch in batches]) for setting, row in rows.items()]
        found.append({"name": name, "batches": batches, "rows": lines})
    return found


def _shown(ratio: Mapping[str, float] | None) -> tuple[str, str]:
    """A ratio in words, and whether all of its quartiles are on one side of 1."""
    if ratio is None:
        return "–", ""
    kind = "good" if ratio["q3"] < 1 else ("bad" if ratio["q1"] > 1 else "")
    return f"{ratio['median']:.2f} [{ratio['q1']:.2f}, {ratio['q3']:.2f}]", kind


def _cell(record: Mapping[str, Any]) -> dict[str, Any]:
    cell = Cell(**record["cell"])
    results = record["models"]
    most = max((r["seconds"]["median"] for r in results.values() if r.get("seconds")), default=0.0)
    first = next(iter(results), None)
    slowed = record.get("watched", {}).get("slowed", ())
    return {
        "work": cell.work,
        "title": str(cell).removeprefix(f"{cell.work}, "),
        "models": [
            _model(cell, name, result, most, "before" if name == first else "after") for name, result in results.items()
        ],
        "warnings": [f"slowed by {reason}" for reason in slowed] + _unsteady(record),
    }


def _unsteady(record: Mapping[str, Any]) -> list[str]:
    measured = any(result.get("seconds") for result in record["models"].values())
    return ["times had not settled after the warm-up"] if measured and not record.get("steady") else []


def _model(cell: Cell, name: str, result: Mapping[str, Any], most: float, kind: str) -> dict[str, Any]:
    spread = result.get("seconds")
    if not spread:
        return {"name": name, "left_out": result.get("left_out", "not measured"), "bar": None, "facts": []}
    told = f"{in_seconds(spread['median'])} [{in_seconds(spread['q1'])}, {in_seconds(spread['q3'])}]"
    facts = [told]
    if result.get("ratio"):
        facts.append(f"ratio {_shown(result['ratio'])[0]}")
    if result.get("first_token"):
        facts.append(f"first token {in_seconds(result['first_token']['median'])}")
    if result.get("first_token_ratio"):
        facts.append(f"ratio of that {_shown(result['first_token_ratio'])[0]}")
    if result.get("tokens_per_second"):
        facts.append(f"{_count(result['tokens_per_second'])} tokens/s after it")
    elif result.get("per_second"):
        facts.append(f"{_count(result['per_second'])}/s")
    if result.get("peak_bytes"):
        facts.append(_bytes(result["peak_bytes"]))
    if result.get("joules") is not None:
        facts.append(f"{result['joules']:.3g} J")
    share = spread["median"] / most if most > 0 else 0.0
    return {"name": name, "left_out": "", "bar": strip(f"{cell}, {name}: {told}", [(share, kind)]), "facts": facts}


def _count(value: float) -> str:
    """A rate with three digits, or as a whole number.

    Examples:
        >>> _count(12.345), _count(12345.6)
        ('12.3', '12,346')
    """
    return f"{value:.3g}" if value < 100 else f"{value:,.0f}"


def _bytes(count: float) -> str:
    """A size with a unit.

    Examples:
        >>> _bytes(1_500_000)
        '1.5 MB'
    """
    for size, unit in _BYTES:
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.0f} B"
