"""From a survey and a budget to the smaller model: choose, carry out, collapse, measure, and choose again if it missed.

Predicted costs are exact for FLOPs and parameters but for what only collapsing shows (a bias that a layer gets, a norm
that is folded away), and approximate for latency. So the outcome is measured, and a miss tightens the next choice.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from linearize.approximate.blocks import replace_block
from linearize.approximate.edit import carry_out
from linearize.approximate.wholes import replace_wholes
from linearize.collapse import collapse
from linearize.cost import cost
from linearize.duplicate import duplicate
from linearize.errors import CollapseError
from linearize.gate import gates
from linearize.plan import UNCHANGED, Plan, SitePlan, make_plan
from linearize.planning.budget import Budget
from linearize.planning.choose import Choice, choose
from linearize.planning.options import BORDERED, WHOLE, SiteChoice
from linearize.planning.survey import Survey
from linearize.record import Record, record_of, set_record

__all__ = ["Settled", "collapsed", "edited", "explained", "fraction_of", "planned", "settle", "site_choices"]

# A latency within this of the target counts as met: measurements differ by as much.
_LATENCY_TOLERANCE = 0.02
_ROUNDS = 4
_LATENCY_ROUNDS = 8  # predictions of latency are further off
_TRUSTED = 0.05  # a prediction of latency no further off than this share of the original's was a good one
_CLOSE = 0.9  # a latency from this share of the target on needs no looser plan
_STEP = 0.75  # the least that an aim may fall to at a time, relative to itself


@dataclass
class Settled:
    """What came out.

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
    time_ratio: Callable[[nn.Module], float],
    say: Callable[[str], None] = lambda _: None,
) -> Settled:
    """The model of least predicted loss within a budget, one-shot.

    Args:
        found: the survey.
        budget: what may remain.
        batch: for which costs are counted.
        time_ratio: latency of a model over the original's, measured.
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
        best = replace(_try(found, budget, stay, batch, lambda _: 1.0), reached=1.0, met=False)
    return best


def _nearest(
    found: Survey,
    budget: Budget,
    batch: Any,
    time_ratio: Callable[[nn.Module], float],
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
    found: Survey, budget: Budget, choice: Choice, batch: Any, time_ratio: Callable[[nn.Module], float]
) -> Settled:
    choices = site_choices(choice)
    gated = edited(found, choices)
    plan = planned(gated, choices, choice)
    try:
        small = collapsed(gated, plan)
    except CollapseError:  # the forms chosen do not go together: let collapsing choose
        plan = planned(gated, {name: c for name, c in choices.items() if c.block})
        small = collapsed(gated, plan)
    predicted = (found.fixed + choice.cost) / found.total
    reached = fraction_of(found, budget, gated, small, batch, time_ratio)
    slack = _LATENCY_TOLERANCE if budget.measure == "latency" else 1e-12
    return Settled(choice, gated, small, plan, predicted, reached, reached <= budget.fraction * (1 + slack))


def fraction_of(
    found: Survey,
    budget: Budget,
    gated: nn.Module,
    small: nn.Module,
    batch: Any,
    time_ratio: Callable[[nn.Module], float],
) -> float:
    """What remains of the cost: counted, or measured for latency."""
    if budget.measure == "latency":
        return time_ratio(small)
    if budget.measure == "activations":
        units = 0.0
        for gate in gates(gated).values():
            positions = float(gate.site.positions) if gate.site is not None else 1.0
            units += positions * (gate.channels - int(gate.linear.sum()))
        return units / found.total
    after = cost(small, batch)
    return (after.flops if budget.measure == "flops" else after.parameters) / found.total


def explained(plan: Plan, found: Survey) -> Plan:
    """The plan with the reason at every site that stays for another one than its loss."""
    reasons = found.reasons
    return Plan(
        tuple(
            replace(site, reason=reasons.get(site.site)) if site.form == UNCHANGED and not site.reason else site
            for site in plan.sites
        )
    )


def site_choices(choice: Choice) -> dict[str, SiteChoice]:
    """What happens to each site, by name, where anything does."""
    each = [c for option in choice.options for c in option.choices]
    return {c.site: c for c in each if c.form != "unchanged"}


def edited(found: Survey, choices: Mapping[str, SiteChoice], keep: Mapping[str, Tensor] | None = None) -> nn.Module:
    """A copy of the gated model with the choices carried out; `keep` overrides which channels stay."""
    model = duplicate(found.gated, CollapseError)
    named = gates(model)
    for name, choice in choices.items():
        if choice.form == "line":
            order = found.unit_costs[name].argsort(stable=True)
            mask = torch.zeros(named[name].channels, dtype=torch.bool)
            mask[order[: named[name].channels - choice.keep]] = True
            named[name].linearize_(mask)
        elif choice.form == WHOLE:
            continue
        elif choice.block:
            if name in found.blocks:
                block = found.blocks[name]
                replace_block(model, block, choice.rank, block.fit(choice.rank, bordered=choice.form == BORDERED))
        elif choice.keep < named[name].channels and name in found.curves:
            carry_out(model, found.curves[name].edit(found.gated, choice, None if keep is None else keep.get(name)))
    wholes = [whole for path, whole in found.wholes.items() if path in choices and choices[path].rank]
    replace_wholes(model, [(whole, fit) for whole in wholes if (fit := whole.fit()) is not None])
    return model


def collapsed(gated: nn.Module, plan: Plan) -> nn.Module:
    """The model in its planned state, collapsed as planned, in eval mode; sites whose block was replaced are done."""
    named = gates(gated)
    if not named:
        small = duplicate(gated, CollapseError).eval()
        record = record_of(gated) or Record()
        set_record(small, Record((), record.steps, record.inputs))
        return small
    return collapse(gated, plan=Plan(tuple(site for site in plan.sites if site.site in named))).eval()


def planned(gated: nn.Module, choices: Mapping[str, SiteChoice], choice: Choice | None = None) -> Plan:
    """The plan of collapsing a model in its planned state, in the forms chosen."""
    losses: dict[str, float] = {}
    for option in choice.options if choice is not None else ():
        for c in option.choices:
            losses[c.site] = option.loss / len(option.choices)
    named = gates(gated)
    blocks = (c for c in choices.values() if c.block)
    sites = [SitePlan(c.site, c.form, (), rank=c.rank, loss=losses.get(c.site, 0.0)) for c in blocks]
    for site in make_plan(gated).sites if named else ():
        chosen = choices.get(site.site)
        if chosen is not None and chosen.form in ("factored", "merged", "vanished") and site.linear and not site.reason:
            gate = named[site.site]
            nothing = (gate.slope == 0) & ((gate.intercept == 0) if gate.gated_unit else True)
            dropped = tuple(i for i in site.linear if bool(nothing[i]))
            site = replace(site, form=chosen.form, dropped=dropped, rank=chosen.rank)  # noqa: PLW2901
        sites.append(replace(site, loss=losses.get(site.site, 0.0)))
    record = record_of(gated) or Record()
    order = {site.name: position for position, site in enumerate(record.sites)}
    return Plan(tuple(sorted(sites, key=lambda site: order.get(site.site, len(order)))))
