"""Compress to a budget by gates: channels go while the model trains, under a prior on what they cost.

With "gates" the model starts as it came, and its gates lead to zero, or to their line. With "both" it starts in the
state of the plan, and channels move between sites. Either way the gates decide during the first part of training, and
the weights settle in the rest.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from linearize.errors import UsageError
from linearize.gating.gate import gates
from linearize.planning.budget import Budget
from linearize.planning.by_budget import decided, surveyed
from linearize.planning.carry_out import explained
from linearize.planning.deciding import Deciding, from_nothing, from_plan
from linearize.planning.job import Job, Made
from linearize.planning.outcomes import drift, gauges, outcome_of
from linearize.planning.request import Request
from linearize.planning.survey import descriptions
from linearize.report.course import Course, SiteMoves
from linearize.running.processes import from_first
from linearize.training.cost_prior import CostPrior
from linearize.training.distance import check_seen

__all__ = ["by_gates"]

_log = logging.getLogger(__name__)


def by_gates(job: Job, request: Request) -> Made:
    """Compress to a budget by gates that decide in training.

    Raises:
        UsageError: nothing may move.
    """
    budget = request.budget
    if budget is None:
        raise UsageError("compress", "found no budget", "Pass exactly one.")
    made, loss, notes = _started(job, request, budget)
    found, market = made.found, made.market
    if not market.slots:
        why = "; ".join(f"{name}: {reason}" for name, reason in list(found.reasons.items())[:3])
        remedy = 'Pass method="plan".'
        raise UsageError("method", f"found {request.method!r}, and no channel that gates may move ({why})", remedy)
    moving, every = {site for group, _ in market.members for site in group.sites}, gates(found.gated)
    if len(moving) < len(every):
        notes += (f"channels may move in {len(moving)} of {len(every)} sites; the others stay as they start",)
    with job.steps("rehearse"):
        first, cut = made.rehearse()
    check_seen(job.original, cut.small, job.data, _predicted(first) if loss is None else loss)
    prior = made.prior(job.deciding_steps)
    with job.steps("fine-tune"):
        options = {**job.options, "on_step": _hearing(prior, job.options.get("on_step"))}
        history = job.train(made.model, prior, {**options, **job.store.training(request.method)})
    with job.steps("collapse"):
        before = _count(prior)
        end = made.end(prior)
    if _count(prior) > before:
        notes += (f"{_count(prior) - before} channels more went after training, to keep to the budget",)
    loss = _predicted(prior) if loss is None else loss
    each = {budget.measure: (prior.share, end.reached)}
    outcome = outcome_of(job, request, found, each, loss, met=end.met)
    if not end.met:
        _log.warning("%s", outcome)
    told = {
        "outcome": outcome,
        "options": descriptions(found.groups, found.measure),
        "notes": (*notes, *drift(job, cut.small, end.small)),
        "method": request.method,
        "course": _course(prior),
    }
    return Made(end.gated, end.small, explained(end.plan, found), history, told)


def _started(job: Job, request: Request, budget: Budget) -> tuple[Deciding, float | None, tuple[str, ...]]:
    """The model as it starts with what may move in it; the predicted loss of its plan, if it has one; and notes."""
    both = request.method == "both"
    held = from_first(lambda: job.store.decision(job.gated)) if both else None
    found = surveyed(job, request, None if budget.measure == "latency" else held)
    around = {"batch": job.batch, "gauges": gauges(job, request), "say": job.steps.say}
    if not both:
        return from_nothing(found, budget, **around), None, tuple(found.notes)
    decision, goal, _ = decided(job, found, request, held)
    made = from_plan(found, budget, goal, decision.by_site, decision.outcome.reached, **around)
    return made, decision.outcome.loss, tuple(decision.notes)


def _hearing(prior: CostPrior, user: Callable[[dict[str, float]], None] | None) -> Callable[[dict[str, float]], None]:
    def hear(record: dict[str, float]) -> None:
        prior.hear(record)
        if user is not None:
            user(record)

    return hear


def _count(prior: CostPrior) -> int:
    return sum(int(mask.sum()) for mask in prior.gone.values())


def _predicted(prior: CostPrior) -> float:
    """The predicted loss of what is gone."""
    return sum(float(slot.losses[prior.gone[name]].sum()) for name, slot in prior.slots.items())


def _course(prior: CostPrior) -> Course:
    """What the prior noted, and what became of each site."""
    sites: dict[str, SiteMoves] = {}
    for name, slot in prior.slots.items():
        start, end = prior.start[name], prior.gone[name]
        free, went, back = (int(mask.sum()) for mask in (~slot.held, end & ~start, start & ~end))
        sites[name] = SiteMoves(slot.channels, free - int(start.sum()), free - int(end.sum()), went, back)
    return Course(tuple(prior.points), sites)
