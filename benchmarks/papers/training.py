"""Training that can be taken up again from any of its steps, and making a share of the channels linear at once."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import linearize
from benchmarks.papers.networks import settle_norms

__all__ = ["GATE_RATE", "TRAINED", "Snapshot", "Task", "Trainer", "apply_masks", "descend", "fitted", "impose", "pace"]

TRAINED = 0.75  # share of the steps after which a network counts as trained; the rest is for recovery
GATE_RATE = 0.02  # learning rate of the gates
_WARMUP = 0.05
_LED = 0.15  # share of the steps that a prior takes to lead channels to their lines
_SECOND = 0.5  # learning rate at the start of the second cosine, relative to the first


@dataclass(frozen=True)
class Task:
    """A model to train and what to train it on. All of it depends on the seed it was made with, and on nothing else.

    Attributes:
        model: with gates, random weights.
        batch: the batch of a step.
        loss: of the model on a batch.
        score: what the model can do on the test set, by name of the measure; the first is the one that counts.
        calibration: batches on which lines are fitted and residuals ranked.
        lr: largest learning rate.
    """

    model: nn.Module
    batch: Callable[[int], Any]
    loss: Callable[[nn.Module, Any], Tensor]
    score: Callable[[nn.Module], dict[str, float]]
    calibration: Sequence[Any]
    lr: float


def pace(step: int, total: int) -> float:
    """The learning rate of a step relative to the largest: a warm-up and a cosine to 0, then a lower cosine.

    The second begins where a network counts as trained. The pace is the same whenever channels become linear.

    Example:
        >>> round(pace(75, 100), 2), pace(0, 100) < 0.3 < pace(10, 100)
        (0.5, True)
    """
    cut = round(TRAINED * total)
    if step >= cut:
        return _SECOND * (1 + math.cos(math.pi * (step - cut) / (total - cut))) / 2
    rise = max(1, round(_WARMUP * total))
    return min(1.0, (step + 1) / rise) * (1 + math.cos(math.pi * step / cut)) / 2


@dataclass(frozen=True)
class Snapshot:
    """A moment of training."""

    step: int
    model: dict[str, Tensor]
    optimizer: dict[str, Any]


class Trainer:
    """Trains the model of a task for a fixed number of steps.

    Args:
        task: what to train.
        steps: the whole budget; the pace of learning depends on it.
    """

    def __init__(self, task: Task, steps: int) -> None:
        self.task, self.steps, self.step = task, steps, 0
        groups = linearize.param_groups(task.model, task.lr, weight_decay=0.05)
        self.optimizer = torch.optim.AdamW([group for group in groups if group["name"] != "gates"])
        for gate in linearize.gates(task.model).values():
            gate.alpha.requires_grad_(False)  # channels change at once here, not by gradient

    def until(self, stop: int) -> None:
        """Train up to a step."""
        model = self.task.model
        model.train()
        for step in range(self.step, stop):
            for group in self.optimizer.param_groups:
                group["lr"] = self.task.lr * pace(step, self.steps)
            descend(self.task, self.optimizer, step)
        self.step = max(self.step, stop)

    def lead(self, share: float) -> None:
        """Train a few steps while a prior leads the share of channels to their lines, and leave them linear.

        The gates learn meanwhile: loss and prior decide together which channels go.
        """
        steps = round(_LED * self.steps)
        calibration = fitted(self.task)
        model = self.task.model
        prior = linearize.SparsityPrior(
            model, kind="target", target=share, steps=steps, weight=1e-2, schedule="linear", calibration=calibration
        )
        alphas = [gate.alpha.requires_grad_() for gate in prior.gates]
        optimizer = torch.optim.Adam(alphas, lr=GATE_RATE)
        for step in range(self.step, self.step + steps):
            model.train()
            optimizer.zero_grad()
            for group in self.optimizer.param_groups:
                group["lr"] = self.task.lr * pace(step, self.steps)
            descend(self.task, self.optimizer, step, prior())
            optimizer.step()
            prior.step()
        self.step += steps
        for alpha in alphas:
            alpha.requires_grad_(False)

    def snapshot(self) -> Snapshot:
        """Everything that training goes on from."""
        state = {name: tensor.clone() for name, tensor in self.task.model.state_dict().items()}
        return Snapshot(self.step, state, copy.deepcopy(self.optimizer.state_dict()))

    def restore(self, snapshot: Snapshot) -> None:
        """Go back to a moment."""
        self.task.model.load_state_dict(snapshot.model)
        self.optimizer.load_state_dict(copy.deepcopy(snapshot.optimizer))
        self.step = snapshot.step


def descend(task: Task, optimizer: torch.optim.Optimizer, step: int, penalty: Tensor | None = None) -> None:
    """One step of training on the batch that belongs to it."""
    loss = task.loss(task.model, task.batch(step))
    optimizer.zero_grad()
    (loss if penalty is None else loss + penalty).backward()
    weights = [p for p in task.model.parameters() if p.grad is not None and p.dim() > 1]
    nn.utils.clip_grad_norm_(weights, 1.0)
    optimizer.step()


def impose(task: Task, share: float) -> dict[str, Tensor]:
    """Make the share of channels linear whose fitted line leaves the smallest residual; returns the masks.

    Lines are fitted to the model as it is now (`linearize.calibrate`); all layers compete with one another.
    """
    calibration = fitted(task)
    residuals = {name: site.residual for name, site in calibration.sites.items()}
    ordered = torch.cat(list(residuals.values()))
    chosen = torch.zeros(len(ordered), dtype=torch.bool)
    chosen[torch.argsort(ordered, stable=True)[: round(share * len(ordered))]] = True
    parts = chosen.split([len(residual) for residual in residuals.values()])
    masks = dict(zip(residuals, parts, strict=True))
    apply_masks(task.model, masks)
    return masks


def fitted(task: Task) -> linearize.Calibration:
    """The lines of all gates, fitted to the model as it is now."""
    settle_norms(task.model, [batch[0] for batch in task.calibration if isinstance(batch, tuple)])
    return linearize.calibrate(task.model, task.calibration, progress=False)


def apply_masks(model: nn.Module, masks: dict[str, Tensor]) -> None:
    """Make channels linear."""
    for name, gate in linearize.gates(model).items():
        gate.linearize_(masks[name])
