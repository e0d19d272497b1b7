"""Where blocks come from: a folder, read block by block, or a model in memory, which is not changed."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from linearize.convert import eager_model
from linearize.errors import CheckpointError, CollapseError
from linearize.planning.resume import fingerprint
from linearize.running.copies import computed_tensors, duplicate
from linearize.running.devices import check_whole
from linearize.storage.shards import Shards, fill_from
from linearize.zoo.hollow import hollow
from linearize.zoo.structure import stored_tensors

__all__ = ["Source", "hollowed", "source_of_folder", "source_of_model"]


@dataclass(frozen=True)
class Source:
    """A model without its weights, and where these come from.

    Attributes:
        model: its parameters are on the meta device.
        around: the model with everything but some blocks, which stay without weights; given their paths.
        block: a block with its weights, by its path; a new one each time.
        key: what tells these weights from others.
        folder: that it came from; None for a model in memory.
        notes: remarks for the report.
    """

    model: nn.Module
    around: Callable[[Sequence[str]], nn.Module]
    block: Callable[[str], nn.Module]
    key: str
    folder: Path | None = None
    notes: tuple[str, ...] = ()


def source_of_folder(folder: Path) -> Source:
    """The model of a folder that `save_pretrained` wrote. Weights keep the types in which they are stored.

    Raises:
        UsageError: the folder holds no model of transformers.
        CheckpointError: a file is missing or damaged, or the weights are of another model.
    """
    model = hollow(folder)
    shards = Shards.open(folder)
    flaw = shards.misfit(model)
    if flaw is not None:
        remedy = "Pass the folder of one model. If transformers reads it all the same, save it again with it first."
        raise CheckpointError(str(folder), flaw, remedy)
    spare = shards.spare(model)
    notes = (f"{len(spare)} tensors of the folder have no place in the model, such as {spare[0]}",) if spare else ()

    def around(blocks: Sequence[str]) -> nn.Module:
        made = copy.deepcopy(model)
        fill_from(shards, made, leave=blocks)
        return made

    def block(path: str) -> nn.Module:
        made = copy.deepcopy(model.get_submodule(path))
        fill_from(shards, made, f"{path}.")
        return made.eval()

    config = (folder / "config.json").read_text(encoding="utf-8")
    return Source(model, around, block, f"{shards.told} {config}", folder, notes)


def source_of_model(model: nn.Module) -> Source:
    """A model in memory.

    Raises:
        UsageError: it is not all on one device, or without values.

    Examples:
        >>> net = nn.Sequential(*(nn.Linear(2, 2) for _ in range(3)))
        >>> found = source_of_model(net)
        >>> found.around(["1"])[1].weight.is_meta, found.around(["1"])[0].weight is net[0].weight
        (True, True)
    """
    model = eager_model(model)
    check_whole(model, values=True)

    def around(blocks: Sequence[str]) -> nn.Module:
        inside = tuple(f"{path}." for path in blocks)
        return _shared(model, {id(t) for name, t in stored_tensors(model).items() if name.startswith(inside)}).eval()

    def block(path: str) -> nn.Module:
        return duplicate(model.get_submodule(path), CollapseError).eval()

    return Source(hollowed(model).eval(), around, block, fingerprint(model))


def hollowed(block: nn.Module) -> nn.Module:
    """The same block without weights; its other tensors are shared.

    Examples:
        >>> hollowed(nn.Linear(2, 3)).weight.is_meta
        True
    """
    return _shared(block, {id(tensor) for tensor in stored_tensors(block).values()})


def _shared(model: nn.Module, without: set[int]) -> nn.Module:
    """A copy that shares all tensors but some, by their ids, which are on the meta device in it."""
    memo: dict[int, Any] = computed_tensors(model)
    memo |= {id(t): _empty(t) if id(t) in without else t for t in stored_tensors(model).values()}
    return copy.deepcopy(model, memo)


def _empty(tensor: Tensor) -> Tensor:
    """The same tensor without values."""
    empty = tensor.detach().to("meta")
    return nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
