"""The best option of every group within a budget: a knapsack with one choice per group.

Groups are merged one after the other; of all partial choices only those survive that none beats in both cost and loss.
If these become more than `limit`, the best of each small interval of cost survives, so that what comes out never
exceeds the budget, and misses the optimum by what `limit` intervals cannot tell apart.

Source: Nemhauser and Ullmann, "Discrete dynamic programming and capital allocation", Management Science 1969.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from linearize.planning.options import Group, Measure, Option

__all__ = ["Choice", "choose", "uniform"]

_LIMIT = 20_000
Numbers = NDArray[np.float64]


@dataclass(frozen=True)
class Choice:
    """One option per group.

    Attributes:
        options: in the order of the groups.
        loss, cost: sums over the groups.
        reachable: whether the budget is met; if not, these are the cheapest options.
    """

    options: tuple[Option, ...]
    loss: float
    cost: float
    reachable: bool


def choose(groups: Sequence[Group], measure: Measure, budget: float, *, limit: int = _LIMIT) -> Choice:
    """The options of least total loss whose total cost is at most `budget`.

    Never worse, in predicted loss, than any uniform choice (`uniform`). If the budget cannot be met: the options of
    least cost.

    Example:
        >>> def group(name, *pairs):
        ...     return Group((name,), tuple(Option((), loss, cost, 0, 0) for loss, cost in pairs))
        >>> made = [group("a", (0, 9), (1, 4)), group("b", (0, 9), (3, 4))]
        >>> found = choose(made, "flops", 13)
        >>> found.loss, found.cost
        (1.0, 13.0)
    """
    cheapest = [min(group.options, key=lambda o: (o.cost(measure), o.loss)) for group in groups]
    if sum(o.cost(measure) for o in cheapest) > budget * (1 + 1e-12):
        return _sum(cheapest, measure, reachable=False)
    rest = _suffix([o.cost(measure) for o in cheapest])
    costs: Numbers = np.zeros(1)
    losses: Numbers = np.zeros(1)
    back: list[tuple[NDArray[np.int64], NDArray[np.int64], list[Option]]] = []
    for index, group in enumerate(groups):
        options = group.pareto(measure).options
        c = (costs[:, None] + np.array([o.cost(measure) for o in options])[None, :]).ravel()
        v = (losses[:, None] + np.array([o.loss for o in options])[None, :]).ravel()
        chosen = _survivors(c, v, budget * (1 + 1e-12) - rest[index + 1], limit)
        back.append((chosen // len(options), chosen % len(options), list(options)))
        costs, losses = c[chosen], v[chosen]
    position = int(losses.argmin())
    picked: list[Option] = []
    for parents, which, options_ in reversed(back):
        picked.append(options_[int(which[position])])
        position = int(parents[position])
    best = _sum(picked[::-1], measure, reachable=True)
    plain = uniform(groups, measure, budget)
    return plain if plain is not None and plain.loss < best.loss else best


def uniform(groups: Sequence[Group], measure: Measure, budget: float) -> Choice | None:
    """The best single kind of option for all groups alike that meets the budget; None if none does.

    A kind is a share of channels that stay, with the same rank of the skip; groups without it stay as they are.
    """
    kinds = dict.fromkeys(_kind(group, option) for group in groups for option in group.options)
    best: Choice | None = None
    for kind in kinds:
        same = [next((o for o in group.options if _kind(group, o) == kind), group.stay) for group in groups]
        found = _sum(same, measure, reachable=True)
        if found.cost <= budget * (1 + 1e-12) and (best is None or found.loss < best.loss):
            best = found
    return best


def _kind(group: Group, option: Option) -> tuple[object, ...]:
    before = {choice.site: choice.keep for choice in group.stay.choices}
    shares = {round(c.keep / max(1, before.get(c.site, c.keep)), 3) for c in option.choices}
    return (tuple(sorted(shares)), tuple(sorted({(c.rank, c.form) for c in option.choices})))


def _sum(options: Sequence[Option], measure: Measure, *, reachable: bool) -> Choice:
    loss, cost = sum(o.loss for o in options), sum(o.cost(measure) for o in options)
    return Choice(tuple(options), float(loss), float(cost), reachable)


def _suffix(costs: Sequence[float]) -> Numbers:
    """`[i]`: the least that the groups from i on must cost."""
    return np.concatenate((np.cumsum(np.array(costs, dtype=np.float64)[::-1])[::-1], [0.0]))


def _survivors(costs: Numbers, losses: Numbers, budget: float, limit: int) -> NDArray[np.int64]:
    """Indices of the partial choices worth keeping."""
    order = np.lexsort((losses, costs))
    order = order[costs[order] <= budget]
    least = np.minimum.accumulate(losses[order])
    better = np.concatenate(([True], least[1:] < least[:-1])) if len(order) else np.zeros(0, dtype=bool)
    order = order[better]
    if len(order) <= limit:
        return order
    spread = costs[order]
    bucket = ((spread - spread[0]) / max(spread[-1] - spread[0], 1e-300) * limit).astype(np.int64)
    last = np.concatenate((bucket[1:] != bucket[:-1], [True]))  # in a bucket the last costs most and loses least
    return order[last]
