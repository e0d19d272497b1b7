"""From a survey and a budget to the smaller model: choose, carry out, collapse, measure, and choose again after a miss.

Predicted FLOPs and parameters are exact, except for what only collapsing shows: a layer may get a bias, or a norm may
be folded away. Predicted latencies are approximate. So the result is measured, and a miss makes the next choice
stricter.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from linearize.cost import cost
from linearize.errors import CollapseError
from linearize.families.option import Measure
from linearize.gating.gate import gates
from linearize.plan import Plan
from linearize.planning.budget import TIMED, Budget
from linearize.planning.carry_out import collapsed, edited, planned, replaced, site_choices
from linearize.planning.knapsack import Choice, choose
from linearize.planning.several import choose_within
from linearize.planning.survey import Survey

__all__ = ["Gauges", "Settled", "fraction_of", "is_met", "settle"]

Gauges = Mapping[Measure, Callable[[nn.Module], float]]
"""By measure, what tells the fraction of the original's that a model takes."""

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
        predicted, reached: fractions of the original's cost; `reached` is counted, or measured for times. Of several
            budgets, the largest share of what is allowed.
        met: whether the budget is met, or all of several.
        each: of several budgets, `predicted` and `reached` by measure.
    """

    choice: Choice
    gated: nn.Module
    small: nn.Module
    plan: Plan
    predicted: float
    reached: float
    met: bool
    each: dict[Measure, tuple[float, float]] = field(default_factory=dict)


def settle(
    found: Survey,
    budget: Budget | Sequence[Budget],
    batch: Any,
    *,
    gauges: Gauges | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Settled:
    """The model of least predicted loss within a budget, without training.

    Args:
        found: the survey.
        budget: what may remain; or several budgets.
        batch: for which costs are counted.
        gauges: what tells the costs that are not counted for the batch, by measure: latencies are timed.
        say: told what is going on.
    """
    known = gauges or {}
    if not isinstance(budget, Budget):
        if len(budget) > 1:
            return _nearest_of_all(found, budget, batch, known, say)
        budget = budget[0]
    best = _nearest(found, budget, batch, known, say)
    wrong = not best.met or abs(best.reached - best.predicted) > _TRUSTED
    if budget.measure in TIMED and wrong:  # a table of single layers may be far off: then plans by FLOPs, too
        by_flops = replace(found, measure="flops", total=float(found.before.flops))
        other = _nearest(by_flops, budget, batch, known, say)
        if _rank(other) > _rank(best):
            own = sum(option.cost(found.measure) for option in other.choice.options)
            best = replace(other, choice=replace(other.choice, cost=own), predicted=(found.fixed + own) / found.total)
    if not best.met and best.reached > 1:  # slower than the original, which then is the nearest
        stay = choose(found.groups, found.measure, float("inf"))
        best = replace(_try(found, replace(budget, measure="flops"), stay, batch, {}), reached=1.0, met=False)
    return best


def _nearest_of_all(
    found: Survey, budgets: Sequence[Budget], batch: Any, gauges: Gauges, say: Callable[[str], None]
) -> Settled:
    """The best model within several budgets. What is missed is asked for more strictly, and chosen again."""
    aims = {budget.measure: budget.fraction for budget in budgets}
    best: Settled | None = None
    timed = any(budget.measure in TIMED for budget in budgets)
    for _ in range(_LATENCY_ROUNDS if timed else _ROUNDS):
        choice = choose_within(found.groups, found.limits(aims))
        settled = _try_all(found, budgets, choice, batch, gauges)
        told = (f"{b.measure} {settled.each[b.measure][1]:.3f} of {b.fraction:.3f}" for b in budgets)
        say(f"  reached {', '.join(told)}")
        if best is None or _rank(settled) > _rank(best):
            best = settled
        if settled.met or not choice.reachable:
            break
        for budget in budgets:
            predicted, reached = settled.each[budget.measure]
            if not is_met(budget, reached):
                one = replace(settled, predicted=predicted, reached=reached)
                aims[budget.measure] = _tightened(aims[budget.measure], budget, one)
        if min(aims.values()) <= 0:
            break
    if best is None:
        raise CollapseError("compress", "no option was tried", "Please report this model.")
    return best


def _try_all(found: Survey, budgets: Sequence[Budget], choice: Choice, batch: Any, gauges: Gauges) -> Settled:
    first, *others = budgets
    settled = _try(
        replace(found, measure=first.measure, total=found.totals[first.measure]), first, choice, batch, gauges
    )
    each = {first.measure: (settled.predicted, settled.reached)}
    met = settled.met
    for budget in others:
        reached = fraction_of(found, budget, settled.gated, settled.small, batch, gauges)
        each[budget.measure] = found.share(budget.measure, choice.options), reached
        met = met and is_met(budget, reached)
    used = [max(each[b.measure][side] / b.fraction for b in budgets) for side in (0, 1)]
    return replace(settled, predicted=used[0], reached=used[1], met=met, each=each)


def is_met(budget: Budget, reached: float) -> bool:
    """Whether what was reached meets a budget; of times, as far as measurements can tell."""
    return reached <= budget.fraction * (1 + (_LATENCY_TOLERANCE if budget.measure in TIMED else 1e-12))


def _nearest(
    found: Survey,
    budget: Budget,
    batch: Any,
    gauges: Gauges,
    say: Callable[[str], None],
) -> Settled:
    """The best model within the budget among plans in the survey's measure, which may be another than the budget's."""
    aim = budget.fraction
    best: Settled | None = None
    met, missed = 0.0, float("inf")  # the largest aim that kept to the budget, and the smallest that did not
    for _ in range(_LATENCY_ROUNDS if budget.measure in TIMED else _ROUNDS):
        choice = choose(found.groups, found.measure, aim * found.total - found.fixed)
        settled = _try(found, budget, choice, batch, gauges)
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
    if budget.measure in TIMED:  # so much of the gain that was promised came true; one measurement is no proof
        came = (1 - settled.reached) / max(1e-6, 1 - settled.predicted)
        wanted = 1 - (1 - budget.fraction) / min(1.0, max(0.2, came))
        return max(_STEP * aim, min(aim - 0.01, wanted))
    return aim - (settled.reached - budget.fraction) * 1.1 - 1e-4


def _try(found: Survey, budget: Budget, choice: Choice, batch: Any, gauges: Gauges) -> Settled:
    choices = site_choices(choice)
    gated = edited(found, choices)
    plan = planned(gated, choices, choice)
    try:
        small = collapsed(gated, plan)
    except CollapseError:  # the forms chosen do not go together: let collapsing choose
        plan = planned(gated, replaced(choices))
        small = collapsed(gated, plan)
    predicted = found.share(found.measure, choice.options)
    reached = fraction_of(found, budget, gated, small, batch, gauges)
    return Settled(choice, gated, small, plan, predicted, reached, is_met(budget, reached))


def fraction_of(
    found: Survey,
    budget: Budget,
    gated: nn.Module,
    small: nn.Module,
    batch: Any,
    gauges: Gauges,
) -> float:
    """The share of the cost that remains: counted, or measured for times."""
    if budget.measure in (*TIMED, "memory"):
        if budget.measure not in gauges:
            raise ValueError(f"a budget in {budget.measure} needs a measurement")
        return gauges[budget.measure](small)
    if budget.measure == "activations":
        units = 0.0
        for gate in gates(gated).values():
            positions = float(gate.site.positions) if gate.site is not None else 1.0
            units += positions * (gate.channels - int(gate.linear.sum()))
        return units / found.totals["activations"]
    after = cost(small, batch)
    return after.flops / found.before.flops if budget.measure == "flops" else after.parameters / found.before.parameters
