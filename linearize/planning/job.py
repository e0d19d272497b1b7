"""The job that all ways of compressing work on, and the result that they make."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from linearize.plan import Plan
from linearize.planning.resume import NOTHING, Notes
from linearize.running.batches import Reading
from linearize.running.steps import Steps

__all__ = ["Job", "Made"]


@dataclass(frozen=True)
class Job:
    """What is compressed, on which data, and how it is trained.

    Attributes:
        original: the model as it came.
        gated: the same, converted.
        data: batches as they are read, each pass over which begins alike.
        batch: one of them, without labels.
        steps: tells and times.
        options: of fine-tuning; 0 epochs for none.
        train: fine-tunes a gated model with a prior and these options, and gives the history.
        notes: of what an interrupted run has found out.
        lean: see `linearize.planning.survey.survey`.
    """

    original: nn.Module
    gated: nn.Module
    data: Reading
    batch: Any
    steps: Steps
    options: Mapping[str, Any]
    train: Callable[[nn.Module, Any, Mapping[str, Any]], list[dict[str, float]]]
    notes: Notes = NOTHING
    lean: bool = False

    @property
    def training_steps(self) -> int:
        """Number of optimizer steps in all."""
        if not self.options["epochs"]:
            return 0
        length = self.options.get("steps_per_epoch")
        length = len(self.data) if length is None else length
        return int(self.options["epochs"]) * math.ceil(int(length) / (self.options.get("accumulate") or 1))


@dataclass(frozen=True)
class Made:
    """The result of a job.

    Attributes:
        gated: the model in its final state, before collapsing.
        small: collapsed.
        plan: what happened to every channel.
        history: of fine-tuning.
        told: fields of the report that only this way of compressing fills.
    """

    gated: nn.Module
    small: nn.Module
    plan: Plan
    history: list[dict[str, float]] = field(default_factory=list)
    told: dict[str, Any] = field(default_factory=dict)
