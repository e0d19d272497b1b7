"""What stays nonlinear while the pressure of the prior rises, and how the tangent kernel moves before that."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

import linearize
from benchmarks.papers.networks import settle_norms
from benchmarks.papers.training import GATE_RATE, TRAINED, Task, Trainer, descend
from benchmarks.runs import Plain
from linearize.analysis import CoreRecorder, TangentRecorder

__all__ = ["PRESSURE", "RATE", "at_most_lost", "decay", "kernels", "smooth"]

PRESSURE = (2e-3, 0.5)  # weight of the prior, at the start and at the end; it rises by the same factor at each step
RATE = 0.1  # learning rate while the prior acts, relative to the largest


def decay(task: Task, steps: int, under_prior: int, every: int) -> Plain:
    """Train, then let the paper's prior act with rising weight until every channel is linear or the steps are over.

    A channel that gives in becomes the identity, as in the paper.

    Returns:
        "trained": the scores before, and "curve": step, effective depth and width, share of nonlinear channels,
        weight of the prior and the scores, every so many steps.
    """
    trainer = Trainer(task, steps)
    trainer.until(round(TRAINED * steps))
    trained = task.score(task.model)
    gates = linearize.gates(task.model)
    for gate in gates.values():
        gate.alpha.requires_grad_(True)
    prior = linearize.SparsityPrior(task.model, kind="paper", weight=PRESSURE[0])
    groups = linearize.param_groups(task.model, RATE * task.lr, GATE_RATE, weight_decay=0.05)
    optimizer = torch.optim.AdamW(groups)
    recorder = CoreRecorder.of(task.model)
    inputs = [batch[0] for batch in task.calibration]
    recorder.record(0, weight=PRESSURE[0], **trained)
    for step in range(under_prior):
        prior.weight = PRESSURE[0] * (PRESSURE[1] / PRESSURE[0]) ** (step / (under_prior - 1))
        task.model.train()
        descend(task, optimizer, trainer.step + step, prior())
        prior.step()
        if (step + 1) % every == 0:
            settle_norms(task.model, inputs)
            recorder.record(step + 1, weight=prior.weight, **task.score(task.model))
            if prior.share == 1:
                break
    return {"trained": trained, "curve": recorder.curve}


def kernels(task: Task, steps: int, places: Sequence[float], samples: int) -> Plain:
    """The tangent kernel on a few training images, at shares of the training steps.

    Returns:
        "curve": step, effective rank, distance from the start, from the record before, and the accuracy.
    """
    trainer = Trainer(task, steps)
    inputs = [batch[0] for batch in task.calibration]
    recorder = TangentRecorder(inputs[0][:samples])
    for place in places:
        trainer.until(round(place * steps))
        held = trainer.snapshot()
        settle_norms(task.model, inputs)
        recorder.record(task.model, place, **task.score(task.model))
        trainer.restore(held)
    return {"curve": recorder.curve}


def at_most_lost(curve: Sequence[dict[str, Any]], measure: str, lost: float) -> dict[str, Any]:
    """The last row up to which the measure, `smooth`, has never been more than `lost` below that of the first row."""
    kept = curve[0]
    for place, row in enumerate(curve[1:], start=1):
        if smooth(curve, measure, place) < curve[0][measure] - lost:
            break
        kept = row
    return kept


def smooth(curve: Sequence[dict[str, Any]], measure: str, place: int) -> float:
    """The mean of the five rows around a row: the measure of a single one jumps by a point or two."""
    around = [float(row[measure]) for row in curve[max(0, place - 2) : place + 3]]
    return sum(around) / len(around)
