"""Compress to a budget: survey, choose, carry out, and fine-tune, gradually if asked."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor, nn

from linearize.errors import CollapseError, UsageError
from linearize.families.family import REMAKE
from linearize.families.option import SiteChoice
from linearize.families.registry import family_of
from linearize.gating.gate import ChannelGate, gates
from linearize.plan import UNCHANGED, Plan, SitePlan
from linearize.planning.budget import SERVED, TIMED
from linearize.planning.candidates import best_after_recovery
from linearize.planning.carry_out import collapsed, edited, explained, planned, replaced, site_choices
from linearize.planning.decision import Decision
from linearize.planning.gradual import path_to
from linearize.planning.job import Job, Made
from linearize.planning.outcomes import drift, dry, gauges, limits, measurements, told_of
from linearize.planning.request import Request
from linearize.planning.search import searched, unscaled
from linearize.planning.sequential import edited_in_order
from linearize.planning.settle import Settled, settle
from linearize.planning.survey import Survey
from linearize.planning.surveying import Wanted, survey
from linearize.running.processes import agreed, from_first
from linearize.surgery.form_choice import mask_of
from linearize.training.distance import check_seen

__all__ = ["decided", "surveyed", "to_budget"]

_log = logging.getLogger(__name__)


def to_budget(job: Job, request: Request) -> Made:
    """Compress to a budget, or by a plan that was made before."""
    steps = job.steps
    ask = bool(request.budgets) and not request.dry_run
    held = from_first(lambda: job.store.decision(job.gated)) if ask else None
    found = surveyed(job, request, held)
    if request.plan is not None:
        return _replayed(job, found, request.plan)
    if request.dry_run:
        with steps("plan"):
            return dry(job, request, found, _searched(job, found, request))
    decision, goal, small = decided(job, found, request, held)
    told = decision.told()
    if not decision.outcome.met:
        _log.warning("%s", decision.outcome)
    gated, tuned, history = _trained(job, found, decision.by_site, goal, decision.plan, small)
    told["notes"] += drift(job, small, tuned) if history else ()
    return Made(gated, tuned, explained(decision.plan, found), history, told)


def surveyed(job: Job, request: Request, held: Decision | None) -> Survey:
    """The survey; without latencies if the plan is settled."""
    steps, means = job.steps, request.means
    asked = [budget.measure for budget in request.budgets] or ["flops"]
    if held is not None and set(asked) & {*TIMED, *SERVED}:
        asked = ["flops"]
    with steps("survey"):
        return survey(
            job.original,
            job.gated,
            job.data,
            job.batch,
            Wanted(
                asked[0],
                also=asked[1:],
                point=job.point(request),
                batch_sizes=request.batch_sizes,
                round_to=means.round_to,
                uniform=request.uniform or means.uniform,
                stock=not means.own_layers,
                modules=means.modules,
                families=request.families,
                seed=request.seed,
                rounds=min(measurements(request), 9),
                cache=request.table,
                runtime=job.runtime,
                lean=job.lean,
            ),
            progress=steps.bars,
            say=lambda text: steps.say(f"  {text}"),
            store=job.store,
        )


def _searched(job: Job, found: Survey, request: Request) -> Survey:
    if not request.search:
        return found
    most = limits(found, request.budgets)
    return searched(found, most, job.data, trials=request.search, seed=request.seed, say=job.steps.say)


def decided(job: Job, found: Survey, request: Request, held: Decision | None) -> tuple[Decision, nn.Module, nn.Module]:
    """What is decided for the budget, or was before an interruption; the model in its planned state, and collapsed."""
    steps = job.steps
    with steps("plan"):
        if held is None:
            decision, goal, small = _settled(job, found, request)
            job.store.decide(decision)
        else:
            steps.say("  the plan of the run that was interrupted")
            decision, goal = held, edited(found, held.by_site)
            small = collapsed(goal, held.plan)
    agreed(decision.plan.sha256, "plans", "Please report this model.")
    if request.sequential:
        with steps("refit"):
            goal = edited_in_order(
                found,
                decision.by_site,
                job.data,
                seed=request.seed,
                progress=steps.bars,
                say=steps.say,
                store=job.store,
            )
            small = collapsed(goal, decision.plan)
    return decision, goal, small


def _settled(job: Job, found: Survey, request: Request) -> tuple[Decision, nn.Module, nn.Module]:
    """What is decided for the budgets; the model in its planned state, and the same collapsed."""
    around = _searched(job, found, request)

    def settle_one(survey: Survey) -> Settled:
        return settle(survey, request.budgets, job.batch, gauges=gauges(job, request), say=job.steps.say)

    tried: tuple[str, ...] = ()
    if request.candidates > 1:
        most = limits(found, request.budgets)
        settled, tried = best_after_recovery(
            job, found, around, most, settle_one, count=request.candidates, distill=request.distill
        )
    else:
        settled = settle_one(around)
    told = told_of(job, request, found, replace(settled, choice=unscaled(settled.choice, found)))
    told["notes"] += tried
    choices = tuple(site_choices(settled.choice).values())
    decision = Decision(settled.plan, choices, told["outcome"], told["options"], told["notes"], around.trials)
    return decision, settled.gated, settled.small


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
        history = job.train(model, path, {**job.options, **job.store.training(told)})
    with job.steps("collapse"):
        return model, collapsed(model, plan), history


def _replayed(job: Job, found: Survey, plan: Plan) -> Made:
    """Carry out a plan that was made before: the same channels, refitted on the data at hand."""
    named = gates(job.gated)
    choices: dict[str, SiteChoice] = {}
    keep: dict[str, Tensor] = {}
    masks: dict[str, Tensor] = {}
    paths = {path for path, _ in job.gated.named_modules(remove_duplicate=False)}
    for site in plan.checked().sites:
        if site.form == UNCHANGED and site.site in paths - named.keys():
            continue  # a place of any family that stays, as a plan says that people have changed
        family = family_of(site.form)
        if family.name not in found.places:
            remedy = f"Leave families= out, or name {family.name!r} in it, too."
            raise UsageError(site.site, f"is of the family {family.name!r} in the plan", remedy)
        if site.site in named:
            _check_site(site, named[site.site])
        again = family.replay(found.places[family.name], site, named.get(site.site))
        if again is None and site.site not in named:
            raise UsageError(site.site, "is in the plan, but not in the model", REMAKE)
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
        raise UsageError(site.site, f"has {site.channels} channels in the plan and {gate.channels} here", REMAKE)
    if site.linear and max(site.linear) >= gate.channels:
        raise UsageError(site.site, f"found channel {max(site.linear)} of {gate.channels} in the plan", REMAKE)
