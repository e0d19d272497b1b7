"""The paper's findings, each confirmed, refuted or undecided by what was measured here, with the numbers.

The rules of judgement are fixed here, in code, whatever the numbers turn out to be.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from benchmarks.papers.cores import at_most_lost, smooth
from benchmarks.papers.moments import CROSSED
from benchmarks.papers.statistics import mean_interval
from benchmarks.runs import Plain

__all__ = ["LOST", "MIDDLE", "cores_at", "findings", "gains", "learned", "measure", "of"]

LOST = 0.03  # accuracy that a core may have lost at most, for cores of equal accuracy
MIDDLE = 0.03  # weight of the prior, for cores under equal pressure
_POINTS = 0.02  # what a network may lose where units "can go"
LEARNED = {"accuracy": 0.7, "chrF": 0.2}  # less, and a dense network has not learned enough to tell anything
_NEARLY = 1.5  # factor within which numbers are nearly constant


def of(results: Iterable[Plain], experiment: str) -> list[Plain]:
    """The runs of an experiment."""
    return [run for run in results if run["experiment"] == experiment]


def measure(run: Plain) -> str:
    """The name of the score that counts."""
    return str(next(iter(run["dense"])))


def names(runs: Iterable[Plain]) -> list[str]:
    """The networks, in order."""
    return list(dict.fromkeys(run["name"] for run in runs))


def learned(runs: Sequence[Plain], name: str) -> bool:
    """True if a network, with no channel linear, learns enough to be judged."""
    scores: list[float] = [run["dense"][measure(run)] for run in runs if run["name"] == name]
    return sum(scores) / len(scores) >= LEARNED[measure(next(run for run in runs if run["name"] == name))]


def gains(runs: Iterable[Plain], later: str, earlier: str) -> list[float]:
    """Score with channels linear from one moment on, minus that from another, for every seed and share."""
    found = []
    for run in runs:
        scores = {(row["moment"], row["share"]): row[measure(run)] for row in run["rows"]}
        found += [scores[later, s] - scores[earlier, s] for m, s in scores if m == later and (earlier, s) in scores]
    return found


def findings(results: Sequence[Plain]) -> list[Plain]:
    """All findings whose runs are there."""
    moments, cores, kernel = (of(results, name) for name in ("moments", "cores", "kernel"))
    found = []
    if moments:
        found += [late_beats_early(moments), choice_or_moment(moments), many_can_go(moments)]
    if cores:
        found += [slow_then_sudden(cores)]
    if len({run["depth"] for run in cores}) > 1:
        found += [constant_over_depth(cores)]
    if len({run["classes"] for run in cores}) > 1:
        found += [grows_with_classes(cores)]
    if kernel:
        found += [kernel_settles(kernel)]
    return found


def finding(claim: str, verdict: str, numbers: str) -> Plain:
    """One record."""
    return {"claim": claim, "verdict": verdict, "numbers": numbers}


def sign(values: Sequence[float]) -> str:
    """Confirmed if the 95% interval of the mean is above 0, refuted if it is below."""
    mean, half = mean_interval(values)
    return "confirmed" if mean - half > 0 else "refuted" if mean + half < 0 else "undecided"


def points(values: Sequence[float]) -> str:
    """A difference of scores, in points of 100, with its 95% interval."""
    mean, half = mean_interval(values)
    return f"{100 * mean:+.1f} ± {100 * half:.1f} ({len(values)})"


def late_beats_early(runs: Sequence[Plain]) -> Plain:
    """Channels that become linear after training against those that are so from the start: a mean per network."""
    each = {name: gains((r for r in runs if r["name"] == name), "trained", "at the start") for name in names(runs)}
    means = [sum(values) / len(values) for name, values in each.items() if learned(runs, name)]
    verdict = sign(means) if len(means) > 1 else "undecided"
    text = "; ".join(f"{name} {points(values)}" for name, values in each.items())
    mean = points(means) if means else "none"
    numbers = f"trained minus start, points, 95% interval (values): {text}; mean of the networks that learn {mean}"
    return finding("Linearising late beats linearising early", verdict, numbers)


def choice_or_moment(runs: Sequence[Plain]) -> Plain:
    """Is the trained network's choice of channels better, whenever they become linear?"""
    late, first = CROSSED
    pairs = {"from the start": (late, "at the start"), "when trained": ("trained", first)}
    values = {text: gains(runs, *pair) for text, pair in pairs.items()}
    every = [value for each in values.values() for value in each]
    verdict = sign(every) if len(every) > 1 else "undecided"
    text = "; ".join(f"{name} {points(each)}" for name, each in values.items() if each)
    return finding("A trained network chooses its channels better", verdict, f"late minus first choice, points: {text}")


def many_can_go(runs: Sequence[Plain]) -> Plain:
    """After training, four in five channels linear: at most two points lost?"""
    lost = {}
    for name in names(runs):
        held = [(r, row) for r in runs if r["name"] == name for row in r["rows"]]
        each = [
            r["dense"][measure(r)] - row[measure(r)]
            for r, row in held
            if row["moment"] == "trained" and row["share"] == 0.8
        ]
        if each:
            lost[name] = each
    fine = [sum(each) / len(each) <= _POINTS for name, each in lost.items() if learned(runs, name)]
    verdict = "undecided" if not fine else "confirmed" if all(fine) else "refuted" if not any(fine) else "mixed"
    text = "; ".join(f"{name} {points(each)}" for name, each in lost.items())
    return finding("After training, 80% of the channels can go for two points", verdict, f"points lost: {text}")


def slow_then_sudden(runs: Sequence[Plain]) -> Plain:
    """How much of all that is lost in the end is lost when half of the channels are linear."""
    each: dict[int, list[float]] = {}
    for run in runs:
        if run["classes"] != 10:
            continue
        curve = run["curve"]
        half = next((place for place, row in enumerate(curve) if row["share"] <= 0.5), len(curve) - 1)
        lost = [curve[0]["accuracy"] - smooth(curve, "accuracy", place) for place in (half, len(curve) - 1)]
        each.setdefault(run["depth"], []).append(lost[0] / lost[1] if lost[1] else 0.0)
    each = dict(sorted(each.items()))
    shares = [sum(values) / len(values) for values in each.values()]
    verdict = "confirmed" if max(shares) < 0.25 else "refuted" if min(shares) >= 0.5 else "mixed"
    text = ", ".join(f"{share:.0%} at depth {depth}" for depth, share in zip(each, shares, strict=True))
    return finding("Decay is slow, then sudden", verdict, f"with half of the channels linear, of all the loss: {text}")


def cores_at(runs: Sequence[Plain], key: str, row_of: Callable[[Plain], Plain]) -> dict[int, dict[str, list[float]]]:
    """Effective depth and width of the cores, by depth or number of classes."""
    found: dict[int, dict[str, list[float]]] = {}
    for run in runs:
        row = row_of(run)
        held = found.setdefault(run[key], {"depth": [], "width": []})
        held["depth"].append(row["depth"])
        held["width"].append(row["width"])
    return dict(sorted(found.items()))


def equal_accuracy(run: Plain) -> Plain:
    """The smallest core of a run that has lost little accuracy."""
    return at_most_lost(run["curve"], "accuracy", LOST)


def equal_pressure(run: Plain) -> Plain:
    """The core of a run under the middle weight of the prior."""
    return min(run["curve"], key=lambda row: abs(row["weight"] - MIDDLE))


RULES: dict[str, Callable[[Plain], Plain]] = {"equal accuracy": equal_accuracy, "equal pressure": equal_pressure}


def _means(held: dict[str, list[float]]) -> dict[str, float]:
    return {size: sum(values) / len(values) for size, values in held.items()}


def _text(rule: str, sizes: dict[int, dict[str, float]]) -> str:
    text = ", ".join(
        f"{place}: {size['depth']:.1f} units deep, {size['width']:.1f} wide" for place, size in sizes.items()
    )
    return f"{rule}: {text}"


def constant_over_depth(runs: Sequence[Plain]) -> Plain:
    """Cores of networks of several depths."""
    chosen = [run for run in runs if run["classes"] == 10]
    verdicts, texts = [], []
    for rule, row_of in RULES.items():
        sizes = {place: _means(held) for place, held in cores_at(chosen, "depth", row_of).items()}
        for size in ("depth", "width"):
            values = [held[size] for held in sizes.values()]
            verdicts.append(min(values) > 0 and max(values) / min(values) <= _NEARLY)
        texts.append(_text(rule, sizes))
    verdict = "confirmed" if all(verdicts) else "mixed" if any(verdicts) else "refuted"
    return finding("The core's depth and width hardly depend on the network's depth", verdict, "; ".join(texts))


def grows_with_classes(runs: Sequence[Plain]) -> Plain:
    """Cores of one network on tasks of several difficulties."""
    depths = [run["depth"] for run in runs if run["classes"] != 10]
    chosen = [run for run in runs if run["depth"] == depths[0]]
    verdicts, texts = [], []
    for rule, row_of in RULES.items():
        held = cores_at(chosen, "classes", row_of)
        few, many = min(held), max(held)
        changes = [zip(held[few][size], held[many][size], strict=False) for size in ("depth", "width")]
        verdicts += [sign([b - a for a, b in change]) for change in changes]
        texts.append(_text(rule, {place: _means(values) for place, values in held.items()}))
    verdict = verdicts[0] if len(set(verdicts)) == 1 else "mixed"
    return finding("The core grows with the number of classes", verdict, "; ".join(texts))


def kernel_settles(runs: Sequence[Plain]) -> Plain:
    """Most of the tangent kernel's way is over early."""
    parts, ranks = [], []
    for run in runs:
        curve: list[dict[str, Any]] = run["curve"]
        early = max(row["distance"] for row in curve if row["step"] <= 0.1)
        parts.append(early / max(row["distance"] for row in curve))
        ranks.append((curve[0]["effective_rank"], curve[-1]["effective_rank"]))
    share = sum(parts) / len(parts)
    first, last = (sum(values) / len(values) for values in zip(*ranks, strict=True))
    verdict = "confirmed" if min(parts) > 0.75 else "refuted" if max(parts) < 0.5 else "undecided"
    numbers = f"{share:.0%} of the distance within 10% of the steps; effective rank {first:.0f} -> {last:.0f}"
    return finding("The tangent kernel takes its shape early in training", verdict, numbers)
