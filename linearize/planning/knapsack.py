"""The best option of every group within a budget: a knapsack problem with one choice per group.

Groups are merged one after the other; groups inside another one come first. A partial choice is kept only if no other
is better in both cost and loss. If more than `limit` partial choices are left, the best one of each small interval of
cost is kept. So the result never exceeds the budget, and misses the optimum by no more than `limit` intervals can
resolve.

Source: Nemhauser and Ullmann, "Discrete dynamic programming and capital allocation", Management Science 1969.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from linearize.families.option import Group, Measure, Option

__all__ = ["Choice", "Tree", "choose", "uniform"]

_LIMIT = 20_000
_STRIDE = 1.02  # by which steps along a front grow
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

    Examples:
        >>> def group(name, *pairs):
        ...     return Group((name,), tuple(Option((), loss, cost, 0, 0) for loss, cost in pairs))
        >>> made = [group("a", (0, 9), (1, 4)), group("b", (0, 9), (3, 4))]
        >>> found = choose(made, "flops", 13)
        >>> found.loss, found.cost
        (1.0, 13.0)
    """
    tree = Tree(groups, measure, limit)
    cheapest = tree.cheapest()
    if sum(o.cost(measure) for o in cheapest) > budget * (1 + 1e-12):
        return _sum(cheapest, measure, reachable=False)
    best = _sum(tree.best(budget), measure, reachable=True)
    plain = uniform(groups, measure, budget)
    return plain if plain is not None and plain.loss < best.loss else best


@dataclass(frozen=True)
class _Front:
    """Partial choices that no other beats in both cost and loss; `pick` gives the options of one, by group."""

    costs: Numbers
    losses: Numbers
    pick: Callable[[int], dict[int, Option]]


@dataclass(frozen=True)
class Tree:
    """Groups, some of which enclose others, which are gone when the outer one is replaced."""

    groups: Sequence[Group]
    measure: Measure
    limit: int

    def cheapest(self) -> list[Option]:
        """The options of least cost."""
        found: dict[int, Option] = {}
        for root in self._inside(""):
            found |= self._cheapest(root)[1]
        return [found[index] for index in range(len(self.groups))]

    def best(self, budget: float) -> list[Option]:
        """The options of least loss within a budget that can be met."""
        roots = self._inside("")
        front = self._joined(roots, budget * (1 + 1e-12))
        found = front.pick(int(front.losses.argmin()))
        return [found[index] for index in range(len(self.groups))]

    def first(self, budget: float, accepts: Callable[[list[Option]], bool]) -> list[Option] | None:
        """The options of least loss within a budget that are accepted; None if none of those that were tried is."""
        front = self._joined(self._inside(""), budget * (1 + 1e-12))
        order = front.losses.argsort()
        position, step = 0, 1.0
        while position < len(order):
            found = front.pick(int(order[position]))
            options = [found[index] for index in range(len(self.groups))]
            if accepts(options):
                return options
            position += int(step)
            step *= _STRIDE
        return None

    def _inside(self, path: str) -> list[int]:
        return [index for index, group in enumerate(self.groups) if group.inside == path]

    def _below(self, index: int) -> list[int]:
        if not self.groups[index].encloses:
            return []
        inner = self._inside(self.groups[index].sites[0])
        return [*inner, *(other for child in inner for other in self._below(child))]

    def _gone(self, index: int) -> dict[int, Option]:
        return {other: self.groups[other].gone for other in self._below(index)}

    def _cheapest(self, index: int) -> tuple[tuple[float, float], dict[int, Option]]:
        group = self.groups[index]
        ways = [{index: option} for option in group.options]
        if group.encloses:
            stay, *others = group.options
            inner = [self._cheapest(child)[1] for child in self._inside(group.sites[0])]
            ways = [{index: stay} | {k: v for some in inner for k, v in some.items()}]
            ways += [{index: option} | self._gone(index) for option in others]
        priced = [(sum(o.cost(self.measure) for o in way.values()), sum(o.loss for o in way.values())) for way in ways]
        least = min(range(len(ways)), key=priced.__getitem__)
        return priced[least], ways[least]

    def _front(self, index: int) -> _Front:
        group = self.groups[index]
        if not group.encloses:
            options = group.pareto(self.measure).options
            costs, losses = (np.array([get(o) for o in options]) for get in (self._cost, lambda o: o.loss))
            return _Front(costs, losses, lambda position: {index: options[position]})
        stay, *others = group.options
        inner, gone = self._joined(self._inside(group.sites[0]), float("inf")), self._gone(index)
        costs = np.append(inner.costs + self._cost(stay), [self._cost(option) for option in others])
        losses = np.append(inner.losses, [option.loss for option in others])

        def pick(position: int) -> dict[int, Option]:
            if position >= len(inner.costs):
                return {index: others[position - len(inner.costs)]} | gone
            return {index: stay} | inner.pick(position)

        return _Front(costs, losses, pick)

    def _cost(self, option: Option) -> float:
        return option.cost(self.measure)

    def _joined(self, indices: Sequence[int], budget: float) -> _Front:
        """The choices for several groups together, of which all others can still be met."""
        rest = _suffix([self._cheapest(index)[0][0] for index in indices])
        costs: Numbers = np.zeros(1)
        losses: Numbers = np.zeros(1)
        back: list[tuple[NDArray[np.int64], NDArray[np.int64], _Front]] = []
        for place, index in enumerate(indices):
            front = self._front(index)
            count = len(front.costs)
            c = (costs[:, None] + front.costs[None, :]).ravel()
            v = (losses[:, None] + front.losses[None, :]).ravel()
            chosen = _survivors(c, v, budget - rest[place + 1], self.limit)
            back.append((chosen // count, chosen % count, front))
            costs, losses = c[chosen], v[chosen]

        def pick(position: int) -> dict[int, Option]:
            found: dict[int, Option] = {}
            for parents, which, front in reversed(back):
                found |= front.pick(int(which[position]))
                position = int(parents[position])
            return found

        return _Front(costs, losses, pick)


def uniform(groups: Sequence[Group], measure: Measure, budget: float) -> Choice | None:
    """The best single kind of option for all groups that meets the budget; None if there is none.

    A kind is a share of channels that stay, with the same rank of the skip; groups without it stay as they are.
    """
    tables: list[dict[object, Option]] = []
    for group in groups:
        table: dict[object, Option] = {}
        for option in () if group.encloses else group.options:
            table.setdefault(_kind(group, option), option)
        tables.append(table)
    best: Choice | None = None
    for kind in dict.fromkeys(kind for table in tables for kind in table):
        same = [table.get(kind, group.stay) for group, table in zip(groups, tables, strict=True)]
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
