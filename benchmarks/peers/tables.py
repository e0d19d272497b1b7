"""Results of runs as means over seeds, and as Markdown."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from benchmarks.runs import Plain

__all__ = ["Point", "lines_of", "markdown", "names_of"]

# How scores are shown: factor, digits, and whether more is better.
SCORES = {
    "accuracy": (100.0, 1, True),
    "agreement": (100.0, 1, True),
    "perplexity": (1.0, 2, False),
    "cosine_mean": (1.0, 4, True),
    "same_nearest": (100.0, 1, True),
}


_SAME = 0.01  # of the original's FLOPs: a plan by latency is made anew in a run for latencies, and may be another


@dataclass(frozen=True)
class Point:
    """One method at one budget, over seeds; a mean with its standard deviation each.

    Attributes:
        method, budget: which.
        before, after: the first score, before and after fine-tuning; None if there is no such model.
        flops, reached: fractions of the original's.
        latency: likewise, by batch size, with half the distance of its quartiles if there is one seed: from the runs
            for latencies alone, if there are any, and if they timed a model of as many FLOPs.
        met: whether all seeds are within the budget.
        failed: what the method said, if it failed for a seed.
        seeds: how many there are.
        others: other scores after fine-tuning, by name, of those that SCORES knows.
    """

    method: str
    budget: float
    before: tuple[float, float] | None
    after: tuple[float, float] | None
    flops: tuple[float, float] | None
    reached: tuple[float, float] | None
    latency: dict[str, tuple[float, float]]
    met: bool
    failed: str
    seeds: int
    others: dict[str, tuple[float, float]]


def names_of(results: Sequence[Plain]) -> list[tuple[str, str]]:
    """Experiments with their networks, in the order of the results."""
    return list(dict.fromkeys((r["experiment"], r["network"]) for r in results))


def lines_of(results: Sequence[Plain], experiment: str, network: str) -> dict[str, list[Point]]:
    """By method, its points in the order of the budgets."""
    same = [r for r in results if (r["experiment"], r["network"]) == (experiment, network)]
    timed = {(r["seed"], row["method"], row["budget"]): row for r in same if r.get("timing_only") for row in r["rows"]}
    latest = {  # a method that was run again, by itself, counts once
        (r["seed"], row["method"], row["budget"]): row for r in same if not r.get("timing_only") for row in r["rows"]
    }
    rows = list(latest.values())
    lines: dict[str, list[Point]] = {}
    for method, budget in dict.fromkeys((row["method"], row["budget"]) for row in rows):
        some = [row for row in rows if (row["method"], row["budget"]) == (method, budget)]
        latencies = [row["latency"] for row in some if "latency" in row]
        alone = [
            one["latency"]
            for (seed, *_), row in latest.items()
            if row in some
            and (one := timed.get((seed, method, budget)))
            and abs(one["flops"] - row.get("flops", 0.0)) < _SAME
        ]
        latencies = alone or latencies
        lines.setdefault(method, []).append(_point(method, budget, some, _latency(latencies)))
    return lines


def _latency(found: Sequence[Plain]) -> dict[str, tuple[float, float]]:
    """By batch size: mean over seeds with deviation; of one seed the median with half the distance of its quartiles."""
    if len(found) == 1:
        return {size: (value[0], (value[2] - value[1]) / 2) for size, value in found[0].items()}
    sizes = found[0] if found else {}
    return {size: _mean([one[size][0] for one in found]) for size in sizes}


def metric_of(results: Sequence[Plain], experiment: str, network: str) -> tuple[str, tuple[float, float]]:
    """The first score's name, and the original's value."""
    kind = (experiment, network)
    same = [r for r in results if (r["experiment"], r["network"]) == kind and not r.get("timing_only")]
    found = list({r["seed"]: r["original"]["scores"] for r in same}.values())
    name = next(iter(found[0]))
    return name, _mean([scores[name] for scores in found])


def _point(method: str, budget: float, rows: Sequence[Plain], latency: dict[str, tuple[float, float]]) -> Point:
    good = [row for row in rows if "model" in row]
    before = [next(iter(row["before"].values())) for row in good if row.get("before")]
    after = [next(iter(row["after"].values())) for row in good]
    failed = next((row["failed"] for row in rows if row.get("failed")), "")
    return Point(
        method,
        budget,
        _mean(before) if before else None,
        _mean(after) if after else None,
        _mean([row["flops"] for row in good]) if good else None,
        _mean([row["reached"] for row in good]) if good else None,
        latency,
        bool(good) and len(good) == len(rows) and all(row["met"] for row in good),
        failed,
        len(rows),
        {name: _mean([row["after"][name] for row in good]) for name in list(good[0]["after"])[1:] if name in SCORES}
        if good
        else {},
    )


def _mean(values: Sequence[float]) -> tuple[float, float]:
    middle = sum(values) / len(values)
    spread = math.sqrt(sum((v - middle) ** 2 for v in values) / (len(values) - 1)) if len(values) > 1 else 0.0
    return middle, spread


def markdown(results: Sequence[Plain], experiment: str, network: str) -> str:
    """Tables: the score after fine-tuning and before it, other scores, and what remains of FLOPs and latencies."""
    lines = lines_of(results, experiment, network)
    name, (whole, spread) = metric_of(results, experiment, network)
    seeds = max(point.seeds for points in lines.values() for point in points)
    budgets = sorted({point.budget for points in lines.values() for point in points}, reverse=True)

    def score(name: str, read: Callable[[Point], tuple[float, float] | None]) -> Callable[[Point], str]:
        def write(point: Point) -> str:
            value = read(point)
            if value is None:
                return "failed" if point.failed else "-"
            return _number(name, value, seeds) if point.met else f"({_number(name, value, seeds)})"

        return write

    def cost(point: Point) -> str:
        if point.flops is None:
            return "-"
        return " / ".join((f"{point.flops[0]:.2f}", *(f"{v:.2f} ± {s:.2f}" for v, s in point.latency.values())))

    sizes = next((point.latency for points in lines.values() for point in points if point.latency), {})
    title = f"### {experiment}, {network}: {name}; the original's is {_number(name, (whole, spread), seeds)}"
    parts = [f"{title}; {seeds} {'seeds' if seeds > 1 else 'seed'}; in brackets where the budget was not met"]
    shown = {
        "after fine-tuning": score(name, lambda point: point.after),
        "before fine-tuning": score(name, lambda point: point.before),
    }
    for other in dict.fromkeys(other for points in lines.values() for point in points for other in point.others):
        shown[f"{other}, after fine-tuning"] = score(other, lambda point, other=other: point.others.get(other))  # type: ignore[misc]
    if sizes:
        shown[f"FLOPs / latency at batch {' / '.join(sizes)}"] = cost
    parts += [_table(head, budgets, lines, write) for head, write in shown.items()]
    failures = {f"{p.method}: {p.failed}" for points in lines.values() for p in points if p.failed}
    return "\n\n".join([*parts, *(f"failed: {text}" for text in sorted(failures))])


def _number(name: str, value: tuple[float, float], seeds: int) -> str:
    """A score as it is shown, with its spread if there are several seeds."""
    factor, digits, _ = SCORES.get(name, (1.0, 3, True))
    text = f"{factor * value[0]:.{digits}f}"
    return f"{text} ± {factor * value[1]:.{digits}f}" if seeds > 1 else text


def _table(head: str, budgets: Sequence[float], lines: dict[str, list[Point]], write: Callable[[Point], str]) -> str:
    rows = [f"| {head} | " + " | ".join(f"{budget:.3g}" for budget in budgets) + " |"]
    rows.append("|:--|" + "--:|" * len(budgets))
    for method, points in lines.items():
        found = {point.budget: point for point in points}
        cells = [write(found[b]) if b in found else "-" for b in budgets]
        rows.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(rows)
