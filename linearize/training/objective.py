"""What a run minimises: the task, a teacher, its features and a prior, for each of the batches of a step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from linearize.errors import TrainingError
from linearize.running.batches import Batch
from linearize.training.cost_prior import CostPrior
from linearize.training.divergence import distillation_loss
from linearize.training.features import Features
from linearize.training.losses import task_loss
from linearize.training.path import PlannedPath
from linearize.training.priors import SparsityPrior

__all__ = ["WHOLE_BATCH", "BatchPart", "Loss", "Objective", "Prior"]

Loss = Callable[[Any, Any], Tensor]
Prior = SparsityPrior | PlannedPath | CostPrior


class BatchPart(NamedTuple):
    """The place of a batch among those whose gradients make one step of the optimizer."""

    place: int = 0
    of: int = 1

    @property
    def last(self) -> bool:
        """Whether the step follows."""
        return self.place + 1 == self.of


WHOLE_BATCH = BatchPart()


@dataclass(frozen=True)
class Objective:
    """What is minimised: (1 - distill_weight) * task + distill_weight * distillation + features + prior."""

    loss: Loss | None = None
    teacher: nn.Module | None = None
    distill_weight: float = 0.0
    temperature: float = 2.0
    prior: Prior | None = None
    features: Features | None = None
    feature_weight: float = 1.0

    def __call__(self, output: Any, batch: Batch, part: BatchPart = WHOLE_BATCH) -> dict[str, Tensor]:
        """The terms that are in use, by name, each with its weight.

        Their sum is divided by the number of batches of a step: so the last of them has the prior so many times.
        """
        terms = {}
        weight = self.distill_weight if self.teacher is not None else 0.0
        if weight < 1:
            loss = self.loss(output, batch.labels) if self.loss else task_loss(output, batch.labels, batch.meaning)
            terms["task"] = (1 - weight) * _scalar(loss)
        if self.teacher is not None and (weight > 0 or self.features is not None):
            with torch.no_grad():
                taught = batch.run(self.teacher)
            if weight > 0:
                terms["distill"] = weight * distillation_loss(output, taught, batch, self.temperature)
        if self.features is not None:
            terms["features"] = self.feature_weight * self.features.loss(batch)
        if self.prior is not None and part.last:
            terms["prior"] = self.prior() if part.of == 1 else part.of * self.prior()
        return terms


def _scalar(loss: Any) -> Tensor:
    if isinstance(loss, Tensor) and loss.dim() == 0:
        return loss
    found = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
    raise TrainingError("loss", f"found {found}", "Return a tensor without axes, for instance loss.mean().")
