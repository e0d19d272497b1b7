"""A budget: survey, choose, carry out, and, if asked, walk there gradually while the model trains."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from linearize.bench import benchmark
from linearize.errors import CollapseError, UsageError
from linearize.gate import gates
from linearize.plan import MASKED, UNCHANGED, Plan, SitePlan, mask_of
from linearize.planning.budget import Budget
from linearize.planning.choose import choose, uniform
from linearize.planning.distance import check_seen, real_loss, some_of
from linearize.planning.job import Job, Made
from linearize.planning.latency import cache_file
from linearize.planning.options import BLOCKS, WHOLE, SiteChoice
from linearize.planning.search import searched, unscaled
from linearize.planning.sequential import edited_in_order
from linearize.planning.settle import Settled, collapsed, edited, planned, settle, site_choices
from linearize.planning.survey import Survey, describe, survey
from linearize.planning.tune import path_to
from linearize.report.budget import Outcome

__all__ = ["How", "to_budget"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class How:
    """Options of a budget, as `linearize.compress` describes them."""

    seed: int = 0
    rounds: int = 15
    batch_sizes: Sequence[int] | None = None
    round_to: int | None = None
    uniform: bool | Sequence[str] = False
    cache: bool | Path = True
    sequential: bool = False
    stock: bool = False
    search: int = 0
    modules: bool = True

    @property
    def table(self) -> Path | None:
        """The file of latencies."""
        if isinstance(self.cache, bool):
            return cache_file() if self.cache else None
        return Path(self.cache)


def to_budget(job: Job, budget: Budget | None, plan: Plan | None, how: How, *, dry_run: bool) -> Made:
    """Compress to a budget, or by a plan that was made before."""
    steps = job.steps
    with steps("survey"):
        found = survey(
            job.original,
            job.gated,
            job.data,
            job.batch,
            measure="flops" if budget is None else budget.measure,
            batch_sizes=how.batch_sizes,
            round_to=how.round_to,
            uniform=how.uniform,
            stock=how.stock,
            modules=how.modules,
            seed=how.seed,
            rounds=min(how.rounds, 9),
            cache=how.table,
            progress=steps.bars,
            say=lambda text: steps.say(f"  {text}"),
            notes=job.notes,
        )
    noted = _plan_file(job)
    if plan is None and noted is not None and noted.exists() and job.options.get("resume"):
        plan = Plan.from_json(noted.read_text(encoding="utf-8"))  # of the run that was interrupted
    if plan is not None:
        return _replayed(job, found, plan)
    if budget is None:
        raise UsageError("compress", "found no budget", "Pass exactly one.")

    def time_ratio(small: nn.Module) -> float:
        pair = {"original": job.original, "collapsed": small}
        timed = benchmark(pair, job.batch, rounds=how.rounds, batch_sizes=how.batch_sizes)
        return sum(ratio.median for ratio in timed.ratios) / len(timed.ratios)

    with steps("plan"):
        around = found
        if how.search:
            aim = budget.fraction * found.total - found.fixed
            around = searched(found, aim, job.data, trials=how.search, seed=how.seed, say=steps.say)
        if dry_run:
            return _dry(found, around, budget)
        settled = settle(around, budget, job.batch, time_ratio=time_ratio, say=steps.say)
    told = _told(found, budget, replace(settled, choice=unscaled(settled.choice, found)))
    if not settled.met:
        _log.warning("%s", told["outcome"])
    goal, small = settled.gated, settled.small
    if noted is not None:
        noted.parent.mkdir(parents=True, exist_ok=True)
        noted.write_text(settled.plan.to_json() + "\n", encoding="utf-8")
    if how.sequential and found.curves:
        with steps("refit"):
            choices = site_choices(settled.choice)
            goal = edited_in_order(
                found, choices, job.data, seed=how.seed, progress=steps.bars, say=steps.say, notes=job.notes
            )
            small = collapsed(goal, settled.plan)
    gated, tuned, history = _trained(job, found, site_choices(settled.choice), goal, settled.plan, small)
    told["notes"] += _drift(job, small, tuned) if history else ()
    return Made(gated, tuned, settled.plan, history, told)


def _drift(job: Job, small: nn.Module, tuned: nn.Module) -> tuple[str, ...]:
    """A note, if fine-tuning took the model away from the original; by labels it may well do so, and rightly."""
    some = some_of(job.data, 4)
    before, after = (real_loss(job.original, model, some) for model in (small, tuned))
    if after <= before:
        return ()
    text = f"fine-tuning took the outputs further from the original's, from {before:.3g} to {after:.3g}"
    return (f"{text} on {len(some)} batches; if labels do not ask for that, lower the learning rate",)


def _plan_file(job: Job) -> Path | None:
    """Where the plan of a fine-tuning that can be resumed is noted, beside its checkpoints."""
    folder = job.options.get("checkpoint_dir")
    return None if folder is None or not job.training_steps else Path(folder) / "plan.json"


def _dry(found: Survey, around: Survey, budget: Budget) -> Made:
    picked = choose(around.groups, found.measure, budget.fraction * found.total - found.fixed)
    choice = unscaled(picked, found)
    choices = site_choices(choice)
    gated = edited(found, choices)
    predicted = (found.fixed + choice.cost) / found.total
    outcome = _outcome(found, budget, predicted, None, choice.loss, None)
    told = {"outcome": outcome, "options": describe(found.groups, found.measure), "notes": tuple(found.notes)}
    return Made(found.gated, found.gated, planned(gated, choices, choice), told=told)


def _told(found: Survey, budget: Budget, settled: Settled) -> dict[str, Any]:
    outcome = _outcome(found, budget, settled.predicted, settled.reached, settled.choice.loss, settled.met)
    return {"outcome": outcome, "options": describe(found.groups, found.measure), "notes": tuple(found.notes)}


def _outcome(
    found: Survey, budget: Budget, predicted: float, reached: float | None, loss: float, met: bool | None
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
        start = edited(found, {name: c for name, c in choices.items() if c.block})
        model, path = path_to(start, goal, steps=way)
        history = job.train(model, path, job.options)
    with job.steps("collapse"):
        return model, collapsed(model, plan), history


def _replayed(job: Job, found: Survey, plan: Plan) -> Made:
    """Carry out a plan that was made before: the same channels, refitted on the data at hand."""
    named = gates(job.gated)
    choices: dict[str, SiteChoice] = {}
    keep: dict[str, Tensor] = {}
    masks: dict[str, Tensor] = {}
    for site in plan.checked().sites:
        if site.form == WHOLE and (site.site in named or site.site in found.wholes):
            choices[site.site] = SiteChoice(site.site, 0, site.rank, WHOLE)
            continue
        _check_site(found, site)
        if site.form in BLOCKS and found.blocks:
            choices[site.site] = SiteChoice(site.site, 0, site.rank, site.form)
        if site.form == UNCHANGED or not site.linear:
            continue
        mask = mask_of(site, named[site.site].channels)
        if site.site in found.curves and (site.dropped or site.rank) and site.form != MASKED:
            choices[site.site] = SiteChoice(site.site, int((~mask).sum()), site.rank, site.form)
            keep[site.site] = (~mask).nonzero().flatten()
        else:
            masks[site.site] = mask
    with job.steps("plan"):
        gated = edited(found, choices, keep)
        for name, mask in masks.items():
            gates(gated)[name].linearize_(mask)
        again = planned(gated, choices)
        try:
            small = collapsed(gated, again)
        except CollapseError:  # channels were edited, and the forms do not go with them: let collapsing choose
            again = planned(gated, {name: choice for name, choice in choices.items() if choice.block})
            small = collapsed(gated, again)
    gated, small, history = _trained(job, found, choices, gated, again, small)
    return Made(gated, small, again, history, {"notes": tuple(found.notes)})


def _check_site(found: Survey, site: SitePlan) -> None:
    """Whether the plan of a site is for this model."""
    gate = gates(found.gated).get(site.site)
    remedy = "Make the plan from this model."
    if gate is None:
        raise UsageError(site.site, "is in the plan, but not in the model", remedy)
    if site.channels and site.channels != gate.channels:
        raise UsageError(site.site, f"has {site.channels} channels in the plan and {gate.channels} here", remedy)
    if site.linear and max(site.linear) >= gate.channels:
        raise UsageError(site.site, f"found channel {max(site.linear)} of {gate.channels} in the plan", remedy)
    curve = found.curves.get(site.site)
    if curve is not None and site.form not in BLOCKS and site.rank > max(1, curve.largest_rank):
        raise UsageError(site.site, f"found rank {site.rank}, and the largest is {curve.largest_rank}", remedy)
