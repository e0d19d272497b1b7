"""The best option of every group within several budgets, which are weighed against each other until one is left.

Source of the idea: Glover, "Surrogate constraints", Operations Research 1968.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from linearize.families.option import Group, Measure, Option
from linearize.planning.knapsack import Choice, Tree, choose

__all__ = ["choose_within"]

_FEWER = 2_000  # partial choices that are kept, since several knapsacks are solved
_WEIGHTS = 12  # ways to weigh budgets against each other
_CLOSE = 1e-3  # between two weights
_NOTHING = 1e-9  # a limit below which nothing may be left


def choose_within(groups: Sequence[Group], limits: Mapping[Measure, float]) -> Choice:
    """The options of least loss whose cost is within a limit in each of several measures.

    With one limit this is `choose`. Several limits are weighed against each other: the costs, each as a share of its
    limit, become one cost by weights that sum to 1, and whatever keeps to all limits has at most 1 of it. The weights
    are found by bisection (or, for more than two, by raising that of the limit that is exceeded most). Along the front
    of each knapsack, the choice of least loss that keeps to all limits is taken. So the result always does; it may
    miss the optimum by what no weights can express. If no limits can be kept, it is the choice that exceeds them least.

    Examples:
        >>> def group(name, *rows):
        ...     return Group((name,), tuple(Option((), loss, f, p, 0) for loss, f, p in rows))
        >>> made = [group(name, (0, 4, 4), (1, 1, 4), (1.5, 4, 1), (4, 1, 1)) for name in "ab"]
        >>> found = choose_within(made, {"flops": 5, "params": 5})
        >>> found.loss, found.reachable
        (2.5, True)
    """
    if len(limits) == 1:
        return next(choose(groups, measure, limit) for measure, limit in limits.items())
    best: Sequence[Option] | None = None
    nearest, least = [group.stay for group in groups], float("inf")
    weights = dict.fromkeys(limits, 1 / len(limits))
    bounds = (0.0, 1.0)
    for _ in range(_WEIGHTS):
        weighed = _together(groups, limits, weights)
        own = {
            id(b): a
            for old, new in zip(groups, weighed, strict=True)
            for a, b in zip(old.options, new.options, strict=True)
        }
        tree = Tree(weighed, "together", _FEWER)
        seen: list[dict[Measure, float]] = []

        def keeps(options: list[Option], seen: list[dict[Measure, float]] = seen) -> bool:
            seen.append(_used(options, limits))
            return max(seen[-1].values()) <= 1 + 1e-12

        cheapest = tree.cheapest()
        for options in (cheapest, tree.first(1.0, keeps)):
            used = max(_used(options or cheapest, limits).values())
            if used < least:
                nearest, least = [own.get(id(option), option) for option in options or cheapest], used
            if options is not None and used <= 1 + 1e-12 and (best is None or _loss(options) < _loss(best)):
                best = [own.get(id(option), option) for option in options]
        ahead = seen[0] if seen else _used(cheapest, limits)
        if max(ahead.values()) <= 1 + 1e-12 or bounds[1] - bounds[0] < _CLOSE:
            break
        weights, bounds = _reweighed(weights, ahead, bounds)
    if best is None:
        best = _any_within(groups, limits)
    found = tuple(best or nearest)
    return Choice(found, float(_loss(found)), max(_used(found, limits).values()), best is not None)


def _any_within(groups: Sequence[Group], limits: Mapping[Measure, float]) -> list[Option] | None:
    """Options that keep to all limits, whatever they lose: within one limit, those that cost least by the others.

    Of two limits none that can be kept is overlooked.
    """
    for measure, limit in limits.items():
        others = {other: 1 / max(most, _NOTHING) for other, most in limits.items() if other != measure}
        turned = [
            replace(
                group,
                options=tuple(replace(o, loss=sum(w * o.cost(m) for m, w in others.items())) for o in group.options),
            )
            for group in groups
        ]
        own = {
            id(new): old
            for a, b in zip(groups, turned, strict=True)
            for old, new in zip(a.options, b.options, strict=True)
        }
        found = Tree(turned, measure, 10 * _FEWER).first(
            limit, lambda some: max(_used(some, limits).values()) <= 1 + 1e-12
        )
        if found is not None:
            return [own.get(id(option), option) for option in found]
    return None


def _loss(options: Sequence[Option]) -> float:
    return sum(option.loss for option in options)


def _used(options: Sequence[Option], limits: Mapping[Measure, float]) -> dict[Measure, float]:
    """By measure, the share of its limit that some options cost; far above 1 where nothing may be left."""
    return {measure: sum(o.cost(measure) for o in options) / max(limit, _NOTHING) for measure, limit in limits.items()}


def _together(
    groups: Sequence[Group], limits: Mapping[Measure, float], weights: Mapping[Measure, float]
) -> list[Group]:
    """The groups with one cost in place of several."""

    def priced(option: Option) -> Option:
        cost = sum(weights[m] * option.cost(m) / max(limit, _NOTHING) for m, limit in limits.items())
        return replace(option, together=cost)

    return [replace(group, options=tuple(map(priced, group.options))) for group in groups]


def _reweighed(
    weights: Mapping[Measure, float], used: Mapping[Measure, float], bounds: tuple[float, float]
) -> tuple[dict[Measure, float], tuple[float, float]]:
    """Other weights, after a choice that exceeds a limit; of two, the first one's weight is between two bounds."""
    if len(weights) > 2:
        raised = {measure: max(weight, _CLOSE) * used[measure] ** 2 for measure, weight in weights.items()}
        total = sum(raised.values())
        return {measure: weight / total for measure, weight in raised.items()}, bounds
    first, second = weights
    bounds = (weights[first], bounds[1]) if used[first] > used[second] else (bounds[0], weights[first])
    weight = sum(bounds) / 2
    return {first: weight, second: 1 - weight}, bounds
