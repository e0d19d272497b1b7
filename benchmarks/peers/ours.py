"""This project's plans: one survey of the model, then for each budget the best of some plans by the real loss."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

import linearize
from benchmarks.peers.subject import Candidate, Method, Subject
from benchmarks.runs import Plain
from linearize.planning.budget import Budget
from linearize.planning.options import Measure
from linearize.planning.search import searched, unscaled
from linearize.planning.settle import settle, site_choices
from linearize.planning.survey import survey

__all__ = ["plan"]

_ROUNDS = 9
_TRIALS = 24  # plans tried with the real loss, on four batches


def plan(measure: Measure, *, cache: Path | None = None, exclude: str | None = None) -> Method:
    """The method whose budgets are fractions of FLOPs, or of latency at the subject's batch sizes.

    Args:
        measure: what the budgets limit.
        cache: file of measured latencies; None measures anew.
        exclude: pattern of sites that stay as they are.
    """

    def method(subject: Subject, budgets: Sequence[float]) -> list[Candidate]:
        gated = linearize.convert(subject.model, subject.example, exclude=exclude)
        found = survey(
            subject.model,
            gated,
            subject.calibration,
            subject.example,
            measure=measure,
            batch_sizes=list(subject.sizes),
            seed=subject.seed,
            cache=cache,
            progress=False,
        )

        def time_ratio(small: nn.Module) -> float:
            pair = {"original": subject.model, "small": small}
            timed = linearize.benchmark(pair, subject.example, rounds=_ROUNDS, batch_sizes=list(subject.sizes))
            return sum(ratio.median for ratio in timed.ratios) / len(timed.ratios)

        made: list[Candidate] = []
        for budget in budgets:
            around = searched(
                found, budget * found.total - found.fixed, subject.calibration, trials=_TRIALS, seed=subject.seed
            )
            settled = settle(around, Budget(measure, budget), subject.example, time_ratio=time_ratio)
            told: Plain = {"choices": [str(choice) for choice in site_choices(settled.choice).values()]}
            told |= {"predicted_loss": unscaled(settled.choice, found).loss, "predicted": settled.predicted}
            made.append(Candidate(budget, _alone(settled.small), settled.reached, settled.met, told=told))
        return made

    return method


def _alone(model: nn.Module) -> nn.Module:
    """The model with all its weights to be trained."""
    for parameter in model.parameters():
        if torch.is_floating_point(parameter):
            parameter.requires_grad_(True)
    return model
