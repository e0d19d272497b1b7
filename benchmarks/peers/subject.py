"""What every method gets, a trained model with its data, and what every method gives, a smaller model."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.peers.hidden import Hidden
from benchmarks.runs import Plain
from linearize.cost import cost
from linearize.running.batches import Batch, read_batch
from linearize.running.models import evaluating
from linearize.running.outputs import main_part
from linearize.training.divergence import distillation_loss
from linearize.training.losses import task_loss

__all__ = ["Candidate", "Method", "Subject", "labelled_loss"]

Scores = dict[str, float]


def labelled_loss(model: nn.Module, raw: Any) -> Tensor:
    """The task's own loss on a batch with labels."""
    batch = read_batch(model, raw)
    return task_loss(model(*batch.args, **batch.kwargs), batch.labels)


@dataclass
class Subject:
    """A trained model, and what a method may use of its task.

    Attributes:
        model: trained, in eval mode; nobody changes it.
        example: one batch without labels, for costs and latencies.
        calibration: batches as the model takes them, with labels if the task has any.
        pick: the batch of a training step, with labels if the task has any.
        score: what a model can do on the test set, by name; the first counts.
        steps, lr: of fine-tuning.
        gentle_lr: rate of another way to fine-tune, in which batch norms keep their statistics; what is better on the
            held-back data counts. 0 for none.
        fresh_lr: of training from random weights.
        hidden: stretches of hidden channels.
        last: names of the modules whose outputs are the model's.
        heads: names of attention's projections, with their number of heads.
        held: batches of the training data, with labels if the task has any, that nothing is trained on; on them
            fine-tuning must show that it helps.
        distill: share of distillation in the loss; 1 needs no labels.
        first: step of the first batch of fine-tuning.
        remember: keep what the teacher says of each step's batch, for the next method.
        sizes: batch sizes of latencies.
        seed: of whatever a method draws.
        surveys: what the plans here have found out already, by what they may not change.
    """

    model: nn.Module
    example: Any
    calibration: Sequence[Any]
    pick: Callable[[int], Any]
    score: Callable[[nn.Module], Scores]
    steps: int
    lr: float
    hidden: tuple[Hidden, ...]
    last: tuple[str, ...] = ()
    heads: Mapping[str, int] = field(default_factory=dict)
    held: Sequence[Any] = ()
    gentle_lr: float = 0.0
    fresh_lr: float = 3e-3
    distill: float = 0.5
    first: int = 0
    remember: bool = True
    sizes: tuple[int, ...] = (1, 64)
    seed: int = 0
    surveys: dict[str, Any] = field(default_factory=dict, repr=False)
    _taught: dict[int, Tensor] = field(default_factory=dict, repr=False)

    @cached_property
    def flops(self) -> int:
        """Of the model, for the example."""
        return cost(self.model, self.example).flops

    def share(self, model: nn.Module) -> float:
        """Another model's FLOPs over those of the original."""
        return cost(model, self.example).flops / self.flops

    def task_loss(self, model: nn.Module, step: int) -> Tensor:
        """The task's own loss on the batch of a step."""
        return labelled_loss(model, self.pick(step))

    def loss(self, model: nn.Module, step: int) -> Tensor:
        """What fine-tuning minimises at a step: the task's loss and distillation from the original, in shares."""
        step = self.first + step
        batch = read_batch(model, self.pick(step))
        return self._loss(model, batch, self._teach(batch, step))

    def judge(self, model: nn.Module) -> float:
        """The same loss on the held-back batches, without training; NaN if there are none."""
        losses = []
        with evaluating(model):
            for raw in self.held:
                batch = read_batch(model, raw)
                taught = main_part(self.model(*batch.args, **batch.kwargs)).tensor
                losses.append(float(self._loss(model, batch, taught)))
        return sum(losses) / len(losses) if losses else math.nan

    def _loss(self, model: nn.Module, batch: Batch, taught: Tensor) -> Tensor:
        output = model(*batch.args, **batch.kwargs)
        part = main_part(output)
        imitate = distillation_loss({part.name: part.tensor}, {part.name: taught}, batch)
        if self.distill == 1:
            return imitate
        return (1 - self.distill) * task_loss(output, batch.labels, batch.meaning) + self.distill * imitate

    def _teach(self, batch: Batch, step: int) -> Tensor:
        if step in self._taught:
            return self._taught[step]
        with torch.no_grad():
            found = main_part(self.model(*batch.args, **batch.kwargs)).tensor.detach()
        if self.remember:
            self._taught[step] = found
        return found


@dataclass
class Candidate:
    """What a method made for one budget.

    Attributes:
        budget: what was asked, as a fraction of the original's cost.
        model: the smaller model, not yet fine-tuned; None if the method failed.
        reached: what it costs in the measure of the budget.
        met: whether that is within the budget; if not, the model is the nearest that the method can give.
        failed: why there is no model.
        steps: of fine-tuning that are left to it; None leaves all.
        scratch: train by the task's loss alone, from random weights, for so many steps; None fine-tunes.
        told: plain data worth keeping.
    """

    budget: float
    model: nn.Module | None
    reached: float = float("nan")
    met: bool = False
    failed: str = ""
    steps: int | None = None
    scratch: int | None = None
    told: Plain = field(default_factory=dict)


Method = Callable[[Subject, Sequence[float]], list[Candidate]]
