"""The face of a format: what it can hold, what a plan may use for it, how it is written and run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from linearize.graph.capture import Inputs

RUNTIME_TOLERANCES = {torch.float64: 1e-5, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Of runtimes that compute in the types of the parameters. For float64: they compute in float32."""

__all__ = ["RUNTIME_TOLERANCES", "Format", "Means", "Proof", "Refusal", "Subject"]


@dataclass(frozen=True)
class Refusal:
    """Why a format cannot hold a model.

    Attributes:
        where: path of the module, or the name of the class if it is the whole model.
        why: what was found there, as a part of a sentence.
    """

    where: str
    why: str


@dataclass(frozen=True)
class Means:
    """What a plan may use if the model shall go into a format afterwards.

    Attributes:
        own_layers: layers that carry merged terms, and new biases; False asks for ordinary layers that get narrower.
        uniform: whether all layers of one shape must keep one width.
        modules: whether whole modules may become one linear map.
        round_to: widths are multiples of this, where kernels want them; None for no wish.
    """

    own_layers: bool = True
    uniform: bool = False
    modules: bool = True
    round_to: int | None = None


@dataclass(frozen=True)
class Subject:
    """What is exported, and what it is compared on.

    Attributes:
        model: the model in eval mode; no format changes it.
        batches: inputs of several shapes, the one that is traced first.
        options: what the caller chose for this format, by name.
        axes: for each tensor of a batch, axes whose size shall be open, with names; None finds them by their sizes.
    """

    model: nn.Module
    batches: list[Inputs]
    options: Mapping[str, Any] = field(default_factory=dict)
    axes: tuple[Mapping[int, str], ...] | None = None


@dataclass(frozen=True)
class Proof:
    """The result of running the exported file in its runtime.

    Attributes:
        runtime: its name and version.
        error: the largest relative error of any output on any batch.
        shapes: how many batches of different shapes were compared.
        told: what else was seen, in a sentence, such as which tokens were generated.
        allowed: the error that the runtime's own arithmetic makes, where it is larger than the format's tolerance.
    """

    runtime: str
    error: float
    shapes: int
    told: str = ""
    allowed: float = 0.0


class Format(Protocol):
    """One format. An object without state; everything that a call needs is in the `Subject`.

    Attributes:
        name: as users say it.
        suffix: of the file; "" if the format is a folder.
        writes, runs: modules that writing and checking import, by the extra that brings them.
        means: what a plan may use.
        tolerances: largest relative error of an exported model, by the coarsest type of its parameters.
        options: names of arguments of `linearize.export` that it takes.
        library: what loads it, as model hubs name it.
        near: formats to name where this one cannot hold a model, the nearest first.
        fixed: whether a file takes inputs of one size only: those of the example.
    """

    name: str
    suffix: str
    writes: Mapping[str, str]
    runs: Mapping[str, str]
    means: Means
    tolerances: Mapping[torch.dtype, float]
    options: tuple[str, ...]
    library: str
    near: tuple[str, ...]
    fixed: bool = False

    def can(self, model: nn.Module) -> Refusal | None:
        """Why the format cannot hold the model; None if nothing is known to be in the way. Nothing is computed."""

    def write(self, subject: Subject, path: Path) -> Mapping[str, Any]:
        """Write the model; facts about the file, for its reader."""

    def check(self, subject: Subject, path: Path) -> Proof:
        """Run the file in the real runtime, and compare."""

    def usage(self, model: nn.Module) -> str:
        """A program that loads the file, whose name is NAME."""
