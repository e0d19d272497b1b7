"""What costs come to, measured on whole models, and what a plan reached of its budgets, as the report tells it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from linearize.bench import benchmark
from linearize.families.option import Measure
from linearize.planning.budget import SERVED, Budget
from linearize.planning.carry_out import edited, explained, planned, site_choices
from linearize.planning.job import Job, Made
from linearize.planning.knapsack import Choice, uniform
from linearize.planning.request import Request
from linearize.planning.search import unscaled
from linearize.planning.settle import Gauges, Settled, is_met
from linearize.planning.several import choose_within
from linearize.planning.survey import Survey, descriptions
from linearize.report.budget import Outcome
from linearize.running.processes import from_first
from linearize.serving.memory import memory
from linearize.serving.turns import ratio_of
from linearize.training.distance import real_loss, some_of

__all__ = ["drift", "dry", "gauges", "limits", "measurements", "outcome_of", "told_of"]

CostShares = Mapping[Measure, tuple[float, float | None]]
"""By measure, the fractions of the original's cost that a plan predicts, and that remain; None if not measured."""


def measurements(request: Request) -> int:
    """Measurements of a latency that a plan rests on."""
    return max(3, request.rounds)


def limits(found: Survey, budgets: Sequence[Budget]) -> dict[Measure, float]:
    """What the options may cost together, by measure."""
    return found.limits({budget.measure: budget.fraction for budget in budgets})


def gauges(job: Job, request: Request) -> Gauges:
    """What tells the costs that are not counted for the example: times, and the memory of a model that is served."""
    point, rounds = job.point(request), measurements(request)

    def latency(small: nn.Module) -> float:
        pair = {"original": job.original, "collapsed": small}
        how: dict[str, Any] = {"rounds": rounds, "batch_sizes": request.batch_sizes, "runtime": job.runtime}
        timed = from_first(lambda: benchmark(pair, job.batch, **how))
        return sum(ratio.median for ratio in timed.ratios) / len(timed.ratios)

    found: dict[Measure, Callable[[nn.Module], float]] = {"latency": latency}
    if point is not None:
        whole = memory(job.original, point).total
        found["memory"] = lambda small: memory(small, point).total / whole
        found["decode"] = lambda small: from_first(lambda: ratio_of(job.original, small, point, "decode", rounds))
        found["prefill"] = lambda small: from_first(lambda: ratio_of(job.original, small, point, "prefill", rounds))
    return found


def dry(job: Job, request: Request, found: Survey, around: Survey) -> Made:
    """What would be done, with predictions; nothing is carried out.

    Args:
        job: what is compressed.
        request: what is asked for.
        found: the survey.
        around: the survey after the search.
    """
    picked = choose_within(around.groups, limits(found, request.budgets))
    choice = unscaled(picked, found)
    choices = site_choices(choice)
    gated = edited(found, choices)
    each = {budget.measure: (found.share(budget.measure, choice.options), None) for budget in request.budgets}
    outcome = outcome_of(job, request, found, each, choice.loss, met=None)
    notes = (*found.notes, *_cache(found, choice))
    told = {"outcome": outcome, "options": descriptions(found.groups, found.measure), "notes": notes}
    told["trials"] = around.trials
    return Made(found.gated, found.gated, explained(planned(gated, choices, choice), found), told=told)


def told_of(job: Job, request: Request, found: Survey, settled: Settled) -> dict[str, Any]:
    """What the report tells of a choice that was carried out and measured."""
    each = settled.each or {request.budgets[0].measure: (settled.predicted, settled.reached)}
    outcome = outcome_of(job, request, found, each, settled.choice.loss, met=settled.met)
    notes = (*found.notes, *_cache(found, settled.choice))
    return {"outcome": outcome, "options": descriptions(found.groups, found.measure), "notes": notes}


def _cache(found: Survey, choice: Choice) -> list[str]:
    """What becomes of the keys and values that a model keeps, if it keeps any."""
    before = sum(group.stay.cache for group in found.groups)
    after = sum(option.cache for option in choice.options)
    return [f"keys and values kept of the example batch: {after:.0f} of {before:.0f} bytes"] if before else []


def outcome_of(
    job: Job, request: Request, found: Survey, each: CostShares, loss: float, *, met: bool | None
) -> Outcome:
    """What became of a budget, or of several."""
    budgets, point = request.budgets, job.point(request)
    parts = []
    for budget in budgets:
        predicted, reached = each[budget.measure]
        least, other = found.least_of(budget.measure), None
        least = least if reached is None else min(least, reached)  # maps that became one cost less than told
        if len(budgets) == 1:
            same = uniform(found.groups, budget.measure, limits(found, budgets)[budget.measure])
            other = None if same is None else same.loss
        own = met if reached is None or len(budgets) == 1 else is_met(budget, reached)
        parts.append(
            Outcome(
                budget.measure,
                budget.fraction,
                predicted,
                reached,
                least,
                loss,
                other,
                own,
                runtime=job.runtime.told if job.runtime is not None and budget.measure == "latency" else None,
                at=str(point) if point is not None and budget.measure in SERVED else "",
            )
        )
    if len(parts) == 1:
        return parts[0]
    predicted, least = (max(getattr(part, name) / part.asked for part in parts) for name in ("predicted", "least"))
    reached = max((part.reached / part.asked for part in parts if part.reached is not None), default=None)
    return Outcome("together", 1.0, predicted, reached, least, loss, None, met, parts=tuple(parts))


def drift(job: Job, small: nn.Module, tuned: nn.Module) -> tuple[str, ...]:
    """A note, if fine-tuning took the model away from the original; by labels it may well do so, and rightly."""
    some = some_of(job.data, 4)
    before, after = (real_loss(job.original, model, some) for model in (small, tuned))
    if after <= before:
        return ()
    text = f"fine-tuning took the outputs further from the original's, from {before:.3g} to {after:.3g}"
    return (f"{text} on {len(some)} batches; if labels do not ask for that, lower the learning rate",)
