"""Compress a model that need not fit into memory: one block at a time, from a folder on the disk to another."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from linearize import checks, zoo
from linearize.blockwise.asked import Asked, Costs
from linearize.blockwise.chain import chain_of
from linearize.blockwise.engine import Engine
from linearize.blockwise.report import BlockReport
from linearize.blockwise.source import Source, source_of_folder, source_of_model
from linearize.blockwise.states import check_room, hollow_states
from linearize.blockwise.told import NotAChain
from linearize.blockwise.work import FinishedBlock, Work
from linearize.blockwise.write import put_together, write_file, write_folder
from linearize.checkpoint import save
from linearize.compress import compress
from linearize.errors import UsageError
from linearize.plan import Plan, SitePlan
from linearize.planning.first_batches import some_batches
from linearize.planning.resume import facts_of, fingerprint
from linearize.running.batches import ReadData
from linearize.running.order import Repeated
from linearize.running.randomness import randomness_kept
from linearize.running.steps import Steps
from linearize.storage.folders import make_folder
from linearize.storage.lock import alone_in
from linearize.zoo.structure import stored_tensors

__all__ = ["BlockwiseResult", "compress_blockwise"]

_log = logging.getLogger(__name__)
_LOCAL = "local: an error costs its own square where it happens, alike in all directions; no gradients were taken"


@dataclass(frozen=True)
class BlockwiseResult:
    """The result of `compress_blockwise`.

    Attributes:
        path: the file or the folder that was written.
        plan: what happened to every channel.
        report: costs and errors, block by block.
    """

    path: Path
    plan: Plan
    report: BlockReport


def compress_blockwise(
    source: str | os.PathLike[str] | nn.Module,
    data: Iterable[Any],
    out: str | os.PathLike[str],
    *,
    params: float | None = None,
    flops: float | None = None,
    stock: bool | None = None,
    round_to: int | None = None,
    checkpoint_dir: str | os.PathLike[str] | None = None,
    seed: int = 0,
    progress: bool | Callable[[str], None] = True,
) -> BlockwiseResult:
    """Make a model smaller, with the weights of one block in memory at a time, and write the result to the disk.

    The model is taken as a chain of blocks: modules called one after the other, each with one hidden state. The hidden
    states of all batches are kept in a file. Each block in turn is read, observed in one pass over its hidden states,
    made smaller as `linearize.compress` does it (channels are removed, and the next layer is refitted), written, and
    passes on what it now computes. If the model is no such chain, it is compressed as a whole; the report says why.

    Args:
        source: a folder that transformers' `save_pretrained` wrote, with .safetensors files; or a model in memory,
            which is not changed.
        data: batches that can be read several times, as for `linearize.compress`.
        out: what to write. A name that ends in .safetensors is a file for `linearize.load`: each block has widths of
            its own. Any other name is a folder for transformers: all blocks have the same widths, and the config says
            them.
        params: budget: fraction of the original's parameters that may remain.
        flops: budget: fraction of its FLOPs.
        stock: use ordinary layers of equal widths only; a folder always does. None takes that.
        round_to: widths are multiples of this; None takes multiples of 8.
        checkpoint_dir: a folder for hidden states and finished blocks, on a disk with room for them; None takes one
            beside `out`. If the run is interrupted, the same call continues behind the last finished block. At the end
            these files are removed.
        seed: of everything random.
        progress: False is silent. A function gets a line of text for each step.

    Returns:
        A `BlockwiseResult` with `.path`, `.plan` and `.report`.

    Raises:
        UsageError: no budget or two, or one that cannot be met because of what is outside the blocks; or no space for
            the hidden states, which says how much is needed.
        CheckpointError: files of the folder are missing or of another model, or the result cannot be written.
        LinearizeError: as for `linearize.compress`.

    Examples:
        >>> import tempfile, torch
        >>> blocks = (nn.Sequential(nn.Linear(8, 64), nn.GELU(), nn.Linear(64, 8)) for _ in range(3))
        >>> net, data = nn.Sequential(*blocks), [torch.randn(64, 8) for _ in range(4)]
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     result = compress_blockwise(net, data, f"{folder}/small.safetensors", params=0.6, progress=False)
        >>> result.report.engine, result.report.met
        ('blockwise', True)
    """
    asked = Asked.of(params, flops, out, stock=stock, round_to=round_to, seed=seed, source=source)
    checks.batches("data", data)
    steps = Steps(progress=progress)
    place = _place(asked.out) if checkpoint_dir is None else checks.folder("checkpoint_dir", checkpoint_dir)
    make_folder(place)
    repeated = Repeated(data, seed)
    with randomness_kept(), alone_in(place, "checkpoint_dir"):
        try:
            opened = source_of_model(source) if isinstance(source, nn.Module) else source_of_folder(_folder(source))
            result = _blockwise(opened, repeated, asked, place, steps)
        except NotAChain as error:
            Work(place, "").forget()
            result = _whole(source, data, asked, f"{error.where}: {error.found}", steps)
        finally:
            repeated.restore()
            with suppress(OSError):  # unless there is something to continue with, or of somebody else
                place.rmdir()
    return result


def _place(out: Path) -> Path:
    return out.with_name(f"{out.name}.unfinished")


def _folder(source: Any) -> Path:
    folder = checks.path("source", source)
    if not folder.is_dir():
        raise UsageError("source", f"found {str(source)!r:.120}, which is no folder", "Pass a folder or a model.")
    return folder


def _blockwise(source: Source, data: Repeated, asked: Asked, place: Path, steps: Steps) -> BlockwiseResult:
    """Block by block."""
    reading = ReadData(source.model, data)
    with steps("blocks"):
        chain, model = chain_of(source.model, next(iter(reading)), source.block, source.around)
        like = hollow_states(model, chain, reading)
        example = some_batches(model, reading, 1)[0]
        costs = Costs.of(source.model, chain.blocks, example, asked.measure)
    share = costs.share(asked)
    work = Work(place, fingerprint(nn.Identity(), source.key, facts_of(data), asked.facts, repr(chain)))
    check_room(place, {} if work.finished() else like, 2 * _bytes(source.model))
    engine = Engine(
        source, model, chain, reading, like, work, share, costs.blocks, asked.options, asked.seed, steps.say
    )
    with steps("compress"):
        notes = engine.run()
    with steps("write"):
        small = put_together(source, model, chain, work, example)
        if asked.folder:
            make_folder(asked.out)
            write_folder(asked.out, small, chain, work, source.folder)
        else:
            write_file(asked.out, small, chain, work)
    work.forget()
    return BlockwiseResult(asked.out, _plan(notes), _report(source, asked, costs, notes, steps))


def _bytes(model: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in stored_tensors(model).values())


def _plan(notes: list[FinishedBlock]) -> Plan:
    """The plan of the whole model."""
    sites: list[SitePlan] = []
    for note in notes:
        sites += [replace(site, site=f"{note.path}.{site.site}") for site in Plan.from_json(note.plan).sites]
    return Plan(tuple(sites))


def _report(source: Source, asked: Asked, costs: Costs, notes: list[FinishedBlock], steps: Steps) -> BlockReport:
    saved = sum(note.before - note.after for note in notes)
    before = sum(parameter.numel() for parameter in source.model.parameters())
    after = [note.after if asked.measure == "params" else note.flops_after for note in notes]
    reached = (costs.whole - sum(costs.blocks) + sum(after)) / max(1, costs.whole)
    told = [f"{note.path}: {text}" for note in notes for text in note.notes]
    return BlockReport(
        "blockwise", "", asked.measure, asked.fraction, reached, reached <= asked.fraction * (1 + 1e-9),
        (before, before - saved), tuple(notes), _LOCAL, steps.seconds, (*source.notes, *told),
    )  # fmt: skip


def _whole(source: Any, data: Iterable[Any], asked: Asked, reason: str, steps: Steps) -> BlockwiseResult:
    """The model as a whole, with all of it in memory, because it is no chain of blocks."""
    _log.warning("the model is compressed as a whole: %s", reason)
    steps.say(f"as a whole: {reason}")
    model = source if isinstance(source, nn.Module) else zoo.create(f"hf:{os.fspath(source)}")
    budget: dict[str, Any] = {asked.measure: asked.fraction}
    options = {**asked.options, "cache": False, "seed": asked.seed}
    result = compress(model, data, **budget, **options, progress=steps.say)
    with steps("write"):
        if asked.folder:
            make_folder(asked.out)
            zoo.stock_copy(result.model).save_pretrained(asked.out)  # type: ignore[operator]
        else:
            save(result.model, asked.out)
    outcome, report = result.report.outcome, result.report
    reached, met = (outcome.reached or 0.0, bool(outcome.met)) if outcome is not None else (0.0, False)
    seconds = {**report.seconds, **steps.seconds}
    return BlockwiseResult(asked.out, result.plan, BlockReport(
        "whole", reason, asked.measure, asked.fraction, reached, met,
        (report.before.parameters, report.after.parameters), (), "of the model's output", seconds, report.notes,
    ))  # fmt: skip
