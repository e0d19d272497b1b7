"""The best plans of different kinds, each trained for a little: the one that recovers best is taken.

A plan that loses least before training need not do so afterwards. So plans that differ in kind (only widths, widths and
one kind of replacement, everything) are trained for a tenth of the steps each. The better half goes on for another
tenth, until one is left (successive halving; Jamieson and Talwalkar, AISTATS 2016).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from linearize.families.option import Group, Measure, Option
from linearize.planning.gradual import path_to
from linearize.planning.job import Job
from linearize.planning.search import DEAR, kinds, unscaled, without_forms
from linearize.planning.settle import Settled
from linearize.planning.several import choose_within
from linearize.planning.survey import Survey
from linearize.running.batches import read_batches
from linearize.running.models import evaluating
from linearize.running.processes import from_first
from linearize.training.distance import some_of
from linearize.training.objective import Objective

__all__ = ["best_after_recovery", "surveys_of"]

_FAVOUR = 0.25  # factor on predicted losses of the family that a kind is named for
_PART = 10  # each round of training takes this part of the steps


@dataclass
class _Candidate:
    """A plan of a kind, the model in its state, and its losses: before training, and after each round."""

    kind: str
    settled: Settled
    model: nn.Module
    losses: list[float] = field(default_factory=list)

    @property
    def rank(self) -> tuple[bool, float]:
        """What is smaller is better: a budget that is met counts first."""
        return not self.settled.met, self.losses[-1]

    def __str__(self) -> str:
        losses = " -> ".join(f"{loss:.4g}" for loss in self.losses)
        missed = "" if self.settled.met else ", which misses the budget"
        return f"{self.kind}: reached {self.settled.reached:.3f}{missed}; loss {losses}"


def surveys_of(found: Survey, around: Survey) -> dict[str, Survey]:
    """By name, surveys whose choices are of different kinds: as it is, only widths, and with one family of others.

    That family's losses count for less: predicted before training, they may be too high for all of a kind.

    Args:
        found: the survey.
        around: the same after the search, which decides the plan with everything in it.
    """
    own = kinds()
    every = [form for forms in own.values() for form in forms]
    made = {"mixed": around, "widths": replace(found, groups=without_forms(found.groups, every))}
    for name, forms in own.items():
        others = [form for form in every if form not in forms]
        favoured = [_favoured(group, forms) for group in without_forms(found.groups, others)]
        made[f"widths and {name}"] = replace(found, groups=favoured)
    return made


def _favoured(group: Group, forms: Sequence[str]) -> Group:
    def favoured(option: Option) -> Option:
        own = any(choice.form in forms for choice in option.choices)
        return replace(option, loss=option.loss * _FAVOUR) if own else option

    return replace(group, options=tuple(map(favoured, group.options)))


def best_after_recovery(
    job: Job,
    found: Survey,
    around: Survey,
    limits: Mapping[Measure, float],
    settle_one: Callable[[Survey], Settled],
    *,
    count: int,
    distill: bool,
) -> tuple[Settled, tuple[str, ...]]:
    """The plan that recovers best of the best `count` of different kinds, and a text for each of them.

    Args:
        job: what is compressed, and how it is trained.
        found: the survey.
        around: the survey after the search.
        limits: costs that the groups may have in all, by measure.
        settle_one: the plan for the budget in a survey.
        count: how many are trained.
        distill: whether training imitates the original.
    """
    loss = _judge(job, distill=distill)
    seen: set[tuple[Option, ...]] = set()
    every: list[_Candidate] = []
    for kind, survey in surveys_of(found, around).items():
        choice = choose_within(survey.groups, limits)
        picked = unscaled(choice, found).options
        if picked not in seen and choice.loss < DEAR:
            seen.add(picked)
            settled = settle_one(survey)
            every.append(_Candidate(kind, settled, settled.gated, [loss(settled.gated)]))
    every.sort(key=lambda candidate: candidate.rank)
    alive = every[:count]
    options, steps = _shortened(job)
    while len(alive) > 1:
        for candidate in alive:
            job.steps.say(f"  candidate {candidate.kind}: {steps} steps")
            candidate.model, path = path_to(candidate.model, candidate.model, steps=0)
            job.train(candidate.model, path, options)
            candidate.losses.append(loss(candidate.model))
        alive = sorted(alive, key=lambda candidate: candidate.rank)[: (len(alive) + 1) // 2]
    told = [f"candidate {candidate}" for candidate in every[:count]]
    told += [f"not tried, {candidate}" for candidate in every[count:]]
    rounds = sum(len(candidate.losses) - 1 for candidate in every)
    head = (
        f"taken: {alive[0].kind}, the best of {min(count, len(every))} plans after {rounds} x {steps} steps of training"
    )
    return alive[0].settled, (head, *told)


def _judge(job: Job, *, distill: bool) -> Callable[[nn.Module], float]:
    """What training minimises, on four batches."""
    names = {"distill_weight": 0.5, "temperature": 2.0}
    chosen: dict[str, Any] = {name: job.options.get(name, value) for name, value in names.items()}
    objective = Objective(job.options.get("loss"), job.original if distill else None, **chosen)
    some = some_of(job.data, 4)

    def loss(model: nn.Module) -> float:
        total, count = 0.0, 0
        with evaluating(model, job.original):
            for batch in read_batches(job.original, some):
                total += batch.size * sum(float(term) for term in objective(batch.run(model), batch).values())
                count += batch.size
        found = total / max(1, count)
        return math.inf if math.isnan(found) else found

    return lambda model: from_first(lambda: loss(model))


def _shortened(job: Job) -> tuple[Mapping[str, Any], int]:
    """Options of a training of a tenth of the steps, without checkpoints, and the number of its steps."""
    given = job.options.get("steps_per_epoch")
    together = job.options.get("accumulate") or 1
    length = len(job.data) if given is None else int(given)
    wanted = max(together, math.ceil(int(job.options["epochs"]) * length / _PART))
    epochs = math.ceil(wanted / length)
    each = math.ceil(wanted / epochs)
    aside = ("checkpoint_dir", "resume", "keep", "on_step", "gradual")
    options = {name: value for name, value in job.options.items() if name not in aside}
    return {**options, "epochs": epochs, "steps_per_epoch": each}, epochs * math.ceil(each / together)
