"""From a survey and a budget to the smaller model: choose, carry out, collapse, measure, and choose again after a miss.

Predicted FLOPs and parameters are exact, except for what only collapsing shows: a layer may get a bias, or a norm may
be folded away. Predicted latencies are approximate. So the result is measured, and a miss makes the next choice
stricter.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from linearize.cost import cost
from linearize.errors import CollapseError
from linearize.gating.gate import gates
from linearize.plan import Plan
from linearize.planning.budget import Budget
from linearize.planning.carry_out import collapsed, edited, planned, replaced, site_choices
from linearize.planning.knapsack import Choice, choose
from linearize.planning.survey import Survey

__all__ = ["Settled", "fraction_of", "kept_to", "settle"]

# A latency within this of the target counts as met: measurements differ by as much.
_LATENCY_TOLERANCE = 0.02
_ROUNDS = 4
_LATENCY_ROUNDS = 8  # predictions of latency are further off
_TRUSTED = 0.05  # a prediction of latency no further off than this share of the original's was a good one
_CLOSE = 0.9  # a latency from this share of the target on needs no looser plan
_STEP = 0.75  # the least that an aim may fall to at a time, relative to itself


@dataclass
class Settled:
    """The result: a choice that was carried out and measured.

    Attributes:
        choice: the options chosen.
        gated: the model in its planned state, gates and all.
        small: the same, collapsed.
        plan: of the collapsing.
        predicted, reached: fractions of the original's cost; `reached` is counted, or measured for latency.
        met: whether the budget is met.
    """

    choice: Choice
    gated: nn.Module
    small: nn.Module
    plan: Plan
    predicted: float
    reached: float
    met: bool


def settle(
    found: Survey,
    budget: Budget,
    batch: Any,
    *,
    time_ratio: Callable[[nn.Module], float] | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Settled:
    """The model of least predicted loss within a budget, without training.

    Args:
        found: the survey.
        budget: what may remain.
        batch: for which costs are counted.
        time_ratio: latency of a model over the original's, measured; None where the budget is none in latency.
        say: told what is going on.
    """
    best = _nearest(found, budget, batch, time_ratio, say)
    wrong = not best.met or abs(best.reached - best.predicted) > _TRUSTED
    if budget.measure == "latency" and wrong:  # a table of single layers may be far off: then plans by FLOPs, too
        by_flops = replace(found, measure="flops", total=float(found.before.flops))
        other = _nearest(by_flops, budget, batch, time_ratio, say)
        if _rank(other) > _rank(best):
            own = sum(option.cost(found.measure) for option in other.choice.options)
            best = replace(other, choice=replace(other.choice, cost=own), predicted=(found.fixed + own) / found.total)
    if not best.met and best.reached > 1:  # slower than the original, which then is the nearest
        stay = choose(found.groups, found.measure, float("inf"))
        best = replace(_try(found, replace(budget, measure="flops"), stay, batch, None), reached=1.0, met=False)
    return best


def _nearest(
    found: Survey,
    budget: Budget,
    batch: Any,
    time_ratio: Callable[[nn.Module], float] | None,
    say: Callable[[str], None],
) -> Settled:
    """The best model within the budget among plans in the survey's measure, which may be another than the budget's."""
    aim = budget.fraction
    best: Settled | None = None
    met, missed = 0.0, float("inf")  # the largest aim that kept to the budget, and the smallest that did not
    for _ in range(_LATENCY_ROUNDS if budget.measure == "latency" else _ROUNDS):
        choice = choose(found.groups, found.measure, aim * found.total - found.fixed)
        settled = _try(found, budget, choice, batch, time_ratio)
        say(f"  predicted {settled.predicted:.3f}, reached {settled.reached:.3f} of the original's {budget.measure}")
        if best is None or _rank(settled) > _rank(best):
            best = settled
        if settled.met:
            met = max(met, aim)
            if missed == float("inf") or settled.reached >= _CLOSE * budget.fraction:
                break
        else:
            missed = min(missed, aim)
            if not choice.reachable:
                break
        aim = (met + missed) / 2 if met else _tightened(aim, budget, settled)
        if aim <= 0:
            break
    if best is None:
        raise CollapseError("compress", "no option was tried", "Please report this model.")
    return best


def _rank(settled: Settled) -> tuple[bool, float]:
    """A budget that is met counts first, then the least predicted loss; of those that miss it, the nearest."""
    return settled.met, -settled.choice.loss if settled.met else -settled.reached


def _tightened(aim: float, budget: Budget, settled: Settled) -> float:
    """What to ask of the plan next, after this one missed the budget and none has met it."""
    if budget.measure == "latency":  # so much of the gain that was promised came true; one measurement is no proof
        came = (1 - settled.reached) / max(1e-6, 1 - settled.predicted)
        wanted = 1 - (1 - budget.fraction) / min(1.0, max(0.2, came))
        return max(_STEP * aim, min(aim - 0.01, wanted))
    return aim - (settled.reached - budget.fraction) * 1.1 - 1e-4


def _try(
    found: Survey, budget: Budget, choice: Choice, batch: Any, time_ratio: Callable[[nn.Module], float] | None
) -> Settled:
    choices = site_choices(choice)
    gated = edited(found, choices)
    plan = planned(gated, choices, choice)
    try:
        small = collapsed(gated, plan)
    except CollapseError:  # the forms chosen do not go together: let collapsing choose
        plan = planned(gated, replaced(choices))
        small = collapsed(gated, plan)
    predicted = (found.fixed + choice.cost) / found.total
    reached = fraction_of(found, budget, gated, small, batch, time_ratio)
    return Settled(choice, gated, small, plan, predicted, reached, kept_to(budget, reached))


def kept_to(budget: Budget, reached: float) -> bool:
    """Whether a budget is met.

    Examples:
        >>> kept_to(Budget("flops", 0.5), 0.501), kept_to(Budget("latency", 0.5), 0.501)
        (False, True)
    """
    slack = _LATENCY_TOLERANCE if budget.measure == "latency" else 1e-12
    return reached <= budget.fraction * (1 + slack)


def fraction_of(
    found: Survey,
    budget: Budget,
    gated: nn.Module,
    small: nn.Module,
    batch: Any,
    time_ratio: Callable[[nn.Module], float] | None,
) -> float:
    """The share of the cost that remains: counted, or measured for latency."""
    if budget.measure == "latency":
        if time_ratio is None:
            raise ValueError("a budget in latency needs a measurement")
        return time_ratio(small)
    if budget.measure == "activations":
        units = 0.0
        for gate in gates(gated).values():
            positions = float(gate.site.positions) if gate.site is not None else 1.0
            units += positions * (gate.channels - int(gate.linear.sum()))
        return units / found.total
    after = cost(small, batch)
    return (after.flops if budget.measure == "flops" else after.parameters) / found.total
