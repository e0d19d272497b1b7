"""Compress to a budget by gates: channels go while the model trains, under a prior on what they cost.

With "gates" the model starts as it came, and its gates lead to zero, or to their line. With "both" it starts in the
state of the plan, and channels move between sites. Either way the gates decide during the first part of training, and
the weights settle in the rest.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from torch import nn

from linearize.errors import CollapseError, UsageError
from linearize.families.option import Group, SiteChoice
from linearize.gating.gate import gates
from linearize.plan import Plan
from linearize.planning.budget import Budget
from linearize.planning.by_budget import decided, surveyed
from linearize.planning.carry_out import collapsed, explained, planned, replaced, site_choices
from linearize.planning.decision import Decision
from linearize.planning.job import Job, Made
from linearize.planning.knapsack import choose
from linearize.planning.market import Market, market_of, without_idle_biases
from linearize.planning.outcomes import drift, gauges, outcome_of
from linearize.planning.request import Request
from linearize.planning.settle import fraction_of, within
from linearize.planning.survey import Survey, descriptions
from linearize.report.course import Course, SiteMoves
from linearize.running.copies import duplicate
from linearize.running.processes import from_first
from linearize.training.cost_prior import CostPrior
from linearize.training.distance import check_seen

__all__ = ["by_gates"]

_log = logging.getLogger(__name__)

_ROUNDS = 6  # of prices moved, or of a stricter aim, after a miss
_RIGHT = 0.01  # a price no further off than this share of the original's cost was right


@dataclass(frozen=True)
class _Measured:
    """A model whose gates are decided, its plan, the same collapsed, and the share of the cost that is left."""

    gated: nn.Module
    plan: Plan
    small: nn.Module
    reached: float


@dataclass
class _Job:
    """One compression by gates.

    Attributes:
        job, request, budget, found: what is asked for, and what the survey found.
        model: gated, in its state at the start.
        fixed: by site, the choices that were carried out and do not change any more.
        market: what may move.
        decision: the plan that it starts from; None for none.
    """

    job: Job
    request: Request
    budget: Budget
    found: Survey
    model: nn.Module
    fixed: Mapping[str, SiteChoice]
    market: Market
    decision: Decision | None
    notes: list[str] = field(default_factory=list)

    def measured(self, prior: CostPrior) -> _Measured:
        """What becomes of a model whose gates are decided."""
        model = duplicate(prior.model, CollapseError)
        without_idle_biases(model, self.found.gated)
        choices = {**self.fixed, **self.market.choices(prior.gone)}
        plan = planned(model, choices)
        try:
            small = collapsed(model, plan)
        except CollapseError:  # the forms chosen do not go together: let collapsing choose
            plan = planned(model, replaced(choices))
            small = collapsed(model, plan)
        reached = fraction_of(self.found, self.budget, model, small, self.job.batch, gauges(self.job, self.request))
        self.job.steps.say(
            f"  promised {prior.share:.3f}, reached {reached:.3f} of the original's {self.budget.measure}"
        )
        return _Measured(model, plan, small, reached)

    def prior(self, model: nn.Module, steps: int) -> CostPrior:
        """A prior on a model in its state at the start."""
        gone, aim = None if self.decision is None else self.market.gone, self.budget.fraction
        return CostPrior(model, self.market.slots, self.market.price, aim=aim, steps=steps, gone=gone)

    def rehearse(self) -> tuple[CostPrior, _Measured]:
        """All decided before any training. Prices are moved by what they promise wrongly, until the budget is met.

        They are exact but for what only collapsing shows; latencies are promises.
        """
        for last in range(_ROUNDS):
            prior = self.prior(duplicate(self.model, CollapseError), 1)
            prior.finish()
            found = self.measured(prior)
            wrong = found.reached - prior.share
            if last == _ROUNDS - 1 or (within(self.budget, found.reached) and abs(wrong) < _RIGHT) or _all_gone(prior):
                break
            self.market.offset += wrong
        return prior, found

    def kept(self, prior: CostPrior) -> _Measured:
        """What becomes of a model whose gates are decided, with more channels gone as long as the budget is missed."""
        found = self.measured(prior)
        for _ in range(_ROUNDS):
            if within(self.budget, found.reached) or _all_gone(prior):
                break
            prior.finish(prior.aim - (found.reached - self.budget.fraction) * 1.1 - 1e-4)
            found = self.measured(prior)
        return found


def by_gates(job: Job, request: Request) -> Made:
    """Compress to a budget by gates that decide in training.

    Raises:
        UsageError: nothing may move.
    """
    budget = request.budget
    if budget is None:
        raise UsageError("compress", "found no budget", "Pass exactly one.")
    made = _started(job, request, budget)
    with job.steps("rehearse"):
        first, cut = made.rehearse()
    check_seen(job.original, cut.small, job.data, _predicted(made, first))
    prior = made.prior(made.model, job.deciding_steps)
    with job.steps("fine-tune"):
        options = {**job.options, "on_step": _hearing(prior, job.options.get("on_step"))}
        history = job.train(made.model, prior, {**options, **job.notes.training(request.method)})
    with job.steps("collapse"):
        before = _count(prior)
        end = made.kept(prior)
        if _count(prior) > before:
            made.notes.append(f"{_count(prior) - before} channels more went after training, to keep to the budget")
    met = within(budget, end.reached)
    each = {budget.measure: (prior.share, end.reached)}
    outcome = outcome_of(job, request, made.found, each, _predicted(made, prior), met=met)
    if not outcome.met:
        _log.warning("%s", outcome)
    notes = (*made.found.notes, *made.notes, *drift(job, cut.small, end.small))
    told = {
        "outcome": outcome,
        "options": descriptions(made.found.groups, made.found.measure),
        "notes": notes,
        "method": request.method,
        "course": _course(prior),
    }
    return Made(end.gated, end.small, explained(end.plan, made.found), history, told)


def _started(job: Job, request: Request, budget: Budget) -> _Job:
    """The model as it starts, and what may move in it."""
    both = request.method == "both"
    held = from_first(lambda: job.notes.decision(job.gated)) if both else None
    found = surveyed(job, request, None if budget.measure == "latency" else held)
    decision: Decision | None = None
    if both:
        decision, model, _ = decided(job, found, request, held)
        choices = decision.by_site
    else:
        model, choices = duplicate(found.gated, CollapseError), _directions(found, budget)
    market = market_of(found, model, choices)
    if not market.slots:
        why = "; ".join(f"{name}: {reason}" for name, reason in list(found.reasons.items())[:3])
        remedy = 'Pass method="plan".'
        raise UsageError("method", f"found {request.method!r}, and no channel that gates may move ({why})", remedy)
    moving = {site for group, _ in market.members for site in group.sites}
    fixed = {site: choice for site, choice in choices.items() if site not in moving} if both else {}
    at = {name: int(mask.sum()) for name, mask in market.gone.items()}
    if decision is not None and decision.outcome.reached is not None:
        market.offset = decision.outcome.reached - market.price(at)
    else:
        market.offset = 1 - market.price(at)
    notes = []
    if len(moving) < len(gates(found.gated)):
        notes = [
            f"channels may move in {len(moving)} of {len(gates(found.gated))} sites; the others stay as they start"
        ]
    return _Job(job, request, budget, found, model, fixed, market, decision, notes)


def _directions(found: Survey, budget: Budget) -> dict[str, SiteChoice]:
    """The sites whose channels go to their line: where the table's best choice in the budget is one full linear map.

    All others lose channels for good. At equal numbers that costs less, and predicted losses say what is worth more.
    """

    def plain(group: Group) -> Group:
        good = [o for o in group.options[1:] if all(_is_cut(choice) for choice in o.choices) and not group.encloses]
        return replace(group, options=(group.stay, *good))

    picked = choose([plain(g) for g in found.groups], found.measure, budget.fraction * found.total - found.fixed)
    return {site: choice for site, choice in site_choices(picked).items() if choice.rank}


def _is_cut(choice: SiteChoice) -> bool:
    return not choice.replaces and (not choice.rank or choice.form in ("merged", "vanished"))


def _hearing(prior: CostPrior, user: Callable[[dict[str, float]], None] | None) -> Callable[[dict[str, float]], None]:
    def hear(record: dict[str, float]) -> None:
        prior.hear(record)
        if user is not None:
            user(record)

    return hear


def _count(prior: CostPrior) -> int:
    return sum(int(mask.sum()) for mask in prior.gone.values())


def _all_gone(prior: CostPrior) -> bool:
    return all(int(prior.gone[name].sum()) >= slot.most for name, slot in prior.slots.items())


def _predicted(made: _Job, prior: CostPrior) -> float:
    """The predicted loss of what is gone; of a plan, its own."""
    if made.decision is not None:
        return made.decision.outcome.loss
    return sum(float(slot.losses[prior.gone[name]].sum()) for name, slot in prior.slots.items())


def _course(prior: CostPrior) -> Course:
    """What the prior noted, and what became of each site."""
    sites: dict[str, SiteMoves] = {}
    for name, slot in prior.slots.items():
        start, end = prior.start[name], prior.gone[name]
        free, went, back = (int(mask.sum()) for mask in (~slot.held, end & ~start, start & ~end))
        sites[name] = SiteMoves(slot.channels, free - int(start.sum()), free - int(end.sum()), went, back)
    return Course(tuple(prior.points), sites)
