"""The job that all ways of compressing work on, and the result that they make."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from linearize.export.runtimes import Runtime
from linearize.plan import Plan
from linearize.planning.request import Request
from linearize.planning.resume import NOTHING, ResumeStore
from linearize.running.batches import ReadData
from linearize.running.steps import Steps
from linearize.serving.point import Point, size_of

__all__ = ["Job", "Made"]

_DECIDED_AFTER = 0.7


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
        store: what an interrupted run has found out.
        runtime: where latencies are measured; None for PyTorch.
        lean: see `linearize.planning.survey.survey`.
    """

    original: nn.Module
    gated: nn.Module
    data: ReadData
    batch: Any
    steps: Steps
    options: Mapping[str, Any]
    train: Callable[[nn.Module, Any, Mapping[str, Any]], list[dict[str, float]]]
    store: ResumeStore = NOTHING
    runtime: Runtime | None = None
    lean: bool = False

    def point(self, request: Request) -> Point | None:
        """Where the model is served, if a budget asks for it."""
        return request.point(size_of(self.batch)[1])

    @property
    def training_steps(self) -> int:
        """Number of optimizer steps in all."""
        if not self.options["epochs"]:
            return 0
        length = self.options.get("steps_per_epoch")
        length = len(self.data) if length is None else length
        return int(self.options["epochs"]) * math.ceil(int(length) / (self.options.get("accumulate") or 1))

    @property
    def deciding_steps(self) -> int:
        """Steps until all gates are decided, at least one. In the rest the weights settle around them."""
        return max(1, int(_DECIDED_AFTER * self.training_steps))


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
