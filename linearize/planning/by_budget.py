"""Compress to a budget: survey, choose, carry out, and fine-tune, gradually if asked."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from linearize.bench import benchmark
from linearize.errors import CollapseError, UsageError
from linearize.families.option import SiteChoice
from linearize.families.registry import family_of
from linearize.gating.gate import ChannelGate, gates
from linearize.plan import UNCHANGED, Plan, SitePlan
from linearize.planning.budget import Budget
from linearize.planning.carry_out import collapsed, edited, explained, planned, replaced, site_choices
from linearize.planning.decision import Decision
from linearize.planning.gradual import path_to
from linearize.planning.job import Job, Made
from linearize.planning.knapsack import Choice, choose, uniform
from linearize.planning.request import Request
from linearize.planning.search import searched, unscaled
from linearize.planning.sequential import edited_in_order
from linearize.planning.settle import Settled, settle
from linearize.planning.survey import Survey, descriptions, survey
from linearize.report.budget import Outcome
from linearize.running.processes import agreed, from_first
from linearize.surgery.form_choice import mask_of
from linearize.training.distance import check_seen, real_loss, some_of

__all__ = ["to_budget"]

_log = logging.getLogger(__name__)
_REMEDY = "Make the plan from this model."


def to_budget(job: Job, request: Request) -> Made:
    """Compress to a budget, or by a plan that was made before."""
    steps, budget = job.steps, request.budget
    ask = budget is not None and not request.dry_run
    held = from_first(lambda: job.notes.decision(job.gated)) if ask else None
    found = _surveyed(job, request, held)
    if request.plan is not None:
        return _replayed(job, found, request.plan)
    if budget is None:
        raise UsageError("compress", "found no budget", "Pass exactly one.")
    with steps("plan"):
        if request.dry_run:
            return _dry(found, _searched(job, found, request), budget)
        if held is None:
            decision, goal, small = _decided(job, found, request)
            job.notes.decide(decision)
        else:
            steps.say("  the plan of the run that was interrupted")
            decision, goal = held, edited(found, held.by_site)
            small = collapsed(goal, held.plan)
    agreed(decision.plan.sha256, "plans", "Please report this model.")
    told, choices = decision.told(), decision.by_site
    if not decision.outcome.met:
        _log.warning("%s", decision.outcome)
    if request.sequential:
        with steps("refit"):
            goal = edited_in_order(
                found, choices, job.data, seed=request.seed, progress=steps.bars, say=steps.say, notes=job.notes
            )
            small = collapsed(goal, decision.plan)
    gated, tuned, history = _trained(job, found, choices, goal, decision.plan, small)
    told["notes"] += _drift(job, small, tuned) if history else ()
    return Made(gated, tuned, explained(decision.plan, found), history, told)


def _surveyed(job: Job, request: Request, held: Decision | None) -> Survey:
    """The survey; without latencies if the plan is settled."""
    steps, means = job.steps, request.means
    measure = "flops" if request.budget is None else request.budget.measure
    with steps("survey"):
        return survey(
            job.original,
            job.gated,
            job.data,
            job.batch,
            measure="flops" if held is not None and measure == "latency" else measure,
            batch_sizes=request.batch_sizes,
            round_to=means.round_to,
            uniform=request.uniform or means.uniform,
            stock=not means.own_layers,
            modules=means.modules,
            families=request.families,
            seed=request.seed,
            rounds=min(_rounds(request), 9),
            cache=request.table,
            progress=steps.bars,
            say=lambda text: steps.say(f"  {text}"),
            notes=job.notes,
            lean=job.lean,
        )


def _rounds(request: Request) -> int:
    """Measurements of a latency that a plan rests on."""
    return max(3, request.rounds)


def _searched(job: Job, found: Survey, request: Request) -> Survey:
    if not request.search or request.budget is None:
        return found
    aim = request.budget.fraction * found.total - found.fixed
    return searched(found, aim, job.data, trials=request.search, seed=request.seed, say=job.steps.say)


def _decided(job: Job, found: Survey, request: Request) -> tuple[Decision, nn.Module, nn.Module]:
    """What is decided for the budget; the model in its planned state, and the same collapsed."""
    budget = request.budget
    if budget is None:
        raise UsageError("compress", "found no budget", "Pass exactly one.")

    def time_ratio(small: nn.Module) -> float:
        pair = {"original": job.original, "collapsed": small}
        timed = from_first(lambda: benchmark(pair, job.batch, rounds=_rounds(request), batch_sizes=request.batch_sizes))
        return sum(ratio.median for ratio in timed.ratios) / len(timed.ratios)

    around = _searched(job, found, request)
    settled = settle(around, budget, job.batch, time_ratio=time_ratio, say=job.steps.say)
    told = _told(found, budget, replace(settled, choice=unscaled(settled.choice, found)))
    choices = tuple(site_choices(settled.choice).values())
    decision = Decision(settled.plan, choices, told["outcome"], told["options"], told["notes"])
    return decision, settled.gated, settled.small


def _drift(job: Job, small: nn.Module, tuned: nn.Module) -> tuple[str, ...]:
    """A note, if fine-tuning took the model away from the original; by labels it may well do so, and rightly."""
    some = some_of(job.data, 4)
    before, after = (real_loss(job.original, model, some) for model in (small, tuned))
    if after <= before:
        return ()
    text = f"fine-tuning took the outputs further from the original's, from {before:.3g} to {after:.3g}"
    return (f"{text} on {len(some)} batches; if labels do not ask for that, lower the learning rate",)


def _dry(found: Survey, around: Survey, budget: Budget) -> Made:
    picked = choose(around.groups, found.measure, budget.fraction * found.total - found.fixed)
    choice = unscaled(picked, found)
    choices = site_choices(choice)
    gated = edited(found, choices)
    predicted = (found.fixed + choice.cost) / found.total
    outcome = _outcome(found, budget, predicted, None, choice.loss, met=None)
    notes = (*found.notes, *_cache(found, choice))
    told = {"outcome": outcome, "options": descriptions(found.groups, found.measure), "notes": notes}
    return Made(found.gated, found.gated, explained(planned(gated, choices, choice), found), told=told)


def _told(found: Survey, budget: Budget, settled: Settled) -> dict[str, Any]:
    outcome = _outcome(found, budget, settled.predicted, settled.reached, settled.choice.loss, met=settled.met)
    notes = (*found.notes, *_cache(found, settled.choice))
    return {"outcome": outcome, "options": descriptions(found.groups, found.measure), "notes": notes}


def _cache(found: Survey, choice: Choice) -> list[str]:
    """What becomes of the keys and values that a model keeps, if it keeps any."""
    before = sum(group.stay.cache for group in found.groups)
    after = sum(option.cache for option in choice.options)
    return [f"keys and values kept of the example batch: {after:.0f} of {before:.0f} bytes"] if before else []


def _outcome(
    found: Survey, budget: Budget, predicted: float, reached: float | None, loss: float, *, met: bool | None
) -> Outcome:
    same = uniform(found.groups, found.measure, budget.fraction * found.total - found.fixed)
    least = found.least if reached is None else min(found.least, reached)  # maps that became one cost less than told
    other = None if same is None else same.loss
    return Outcome(budget.measure, budget.fraction, predicted, reached, least, loss, other, met)


def _trained(
    job: Job, found: Survey, choices: Mapping[str, SiteChoice], goal: nn.Module, plan: Plan, small: nn.Module
) -> tuple[nn.Module, nn.Module, list[dict[str, float]]]:
    """The planned model after fine-tuning, collapsed; as it is if none is asked for."""
    check_seen(job.original, small, job.data, sum(site.loss or 0.0 for site in plan.sites))
    total = job.training_steps
    if not total:
        return goal, small, []
    with job.steps("fine-tune"):
        way = int(job.options.get("gradual", 0) * total)
        start = edited(found, replaced(choices))
        model, path = path_to(start, goal, steps=way)
        told = f"{plan.to_json()} {sorted(map(repr, choices.values()))}"
        history = job.train(model, path, {**job.options, **job.notes.training(told)})
    with job.steps("collapse"):
        return model, collapsed(model, plan), history


def _replayed(job: Job, found: Survey, plan: Plan) -> Made:
    """Carry out a plan that was made before: the same channels, refitted on the data at hand."""
    named = gates(job.gated)
    choices: dict[str, SiteChoice] = {}
    keep: dict[str, Tensor] = {}
    masks: dict[str, Tensor] = {}
    for site in plan.checked().sites:
        family = family_of(site.form)
        if family.name not in found.places:
            remedy = f"Leave families= out, or name {family.name!r} in it, too."
            raise UsageError(site.site, f"is of the family {family.name!r} in the plan", remedy)
        if site.site in named:
            _check_site(site, named[site.site])
        again = family.replay(found.places[family.name], site, named.get(site.site))
        if again is None and site.site not in named:
            raise UsageError(site.site, "is in the plan, but not in the model", _REMEDY)
        if again is not None:
            choices[site.site] = again.choice
            if again.keep is not None:
                keep[site.site] = again.keep
        elif site.form != UNCHANGED and site.linear:
            masks[site.site] = mask_of(site, named[site.site].channels)
    with job.steps("plan"):
        gated = edited(found, choices, keep)
        for name, mask in masks.items():
            gates(gated)[name].linearize_(mask)
        told = planned(gated, choices)
        try:
            small = collapsed(gated, told)
        except CollapseError:  # channels were edited, and the forms do not go with them: let collapsing choose
            told = planned(gated, replaced(choices))
            small = collapsed(gated, told)
    gated, small, history = _trained(job, found, choices, gated, told, small)
    return Made(gated, small, explained(told, found), history, {"notes": tuple(found.notes)})


def _check_site(site: SitePlan, gate: ChannelGate) -> None:
    """Whether the plan of a site is for this model."""
    if site.channels and site.channels != gate.channels:
        raise UsageError(site.site, f"has {site.channels} channels in the plan and {gate.channels} here", _REMEDY)
    if site.linear and max(site.linear) >= gate.channels:
        raise UsageError(site.site, f"found channel {max(site.linear)} of {gate.channels} in the plan", _REMEDY)
