"""This project's plans: one survey of the model, then for each budget the best of some plans by the real loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

import linearize
from benchmarks.peers.subject import Candidate, Method, Subject
from benchmarks.runs import Plain
from linearize.families.option import Measure
from linearize.planning.budget import Budget
from linearize.planning.carry_out import site_choices
from linearize.planning.search import searched, unscaled
from linearize.planning.settle import Settled, settle
from linearize.planning.survey import Survey
from linearize.planning.surveying import Wanted, survey

__all__ = ["alone", "plan", "settled_for", "surveyed"]

_ROUNDS = 9
_TRIALS = 24  # plans tried with the real loss, on four batches


def plan(measure: Measure, *, cache: Path | None = None, exclude: str | None = None, timed: bool = False) -> Method:
    """The method whose budgets are fractions of FLOPs, or of latency at the subject's batch sizes.

    Args:
        measure: what the budgets limit.
        cache: file of measured latencies; None measures anew.
        exclude: pattern of sites that stay as they are.
        timed: measure latencies in any case, for another plan of the same subject, which then needs no survey.
    """

    def method(subject: Subject, budgets: Sequence[float]) -> list[Candidate]:
        found = surveyed(subject, measure, cache, exclude, timed=timed)

        made: list[Candidate] = []
        for budget in budgets:
            settled = settled_for(subject, found, Budget(measure, budget))
            told: Plain = {"choices": [str(choice) for choice in site_choices(settled.choice).values()]}
            told |= {"predicted_loss": unscaled(settled.choice, found).loss, "predicted": settled.predicted}
            made.append(Candidate(budget, alone(settled.small), settled.reached, settled.met, told=told))
        return made

    return method


def settled_for(subject: Subject, found: Survey, budget: Budget) -> Settled:
    """The plan for a budget, the best of some by the real loss."""

    def latency(small: nn.Module) -> float:
        pair = {"original": subject.model, "small": small}
        timed = linearize.benchmark(pair, subject.example, rounds=_ROUNDS, batch_sizes=list(subject.sizes))
        return sum(ratio.median for ratio in timed.ratios) / len(timed.ratios)

    left = budget.fraction * found.total - found.fixed
    around = searched(found, left, subject.calibration, trials=_TRIALS, seed=subject.seed)
    return settle(around, budget, subject.example, gauges={"latency": latency})


def surveyed(subject: Subject, measure: Measure, cache: Path | None, exclude: str | None, *, timed: bool) -> Survey:
    """What the sites of a subject could become; one survey with latencies serves every measure."""
    known: Survey | None = subject.surveys.get(str(exclude))
    if known is None or (measure == "latency" and known.measure != "latency"):
        known = survey(
            subject.model,
            linearize.convert(subject.model, subject.example, exclude=exclude),
            subject.calibration,
            subject.example,
            Wanted("latency" if timed else measure, batch_sizes=list(subject.sizes), seed=subject.seed, cache=cache),
            progress=False,
        )
        subject.surveys[str(exclude)] = known
    total = {"flops": float(known.before.flops), "params": float(known.before.parameters)}.get(measure, 1.0)
    return replace(known, measure=measure, total=total)


def alone(model: nn.Module) -> nn.Module:
    """The model with all its weights to be trained."""
    for parameter in model.parameters():
        if torch.is_floating_point(parameter):
            parameter.requires_grad_(True)
    return model
