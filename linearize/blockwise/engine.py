"""The engine: one block after the other is read, observed, compressed, stored, and passes its output on.

Each block is a model of its own for all that is done to it: its hidden states are its data, and what an error costs is
told where the error happens, by its square. The blocks before it are compressed already, so that it makes up for what
they changed.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain as joined
from typing import Any

from torch import Tensor, nn

from linearize.blockwise.asked import Share
from linearize.blockwise.chain import BlockChain
from linearize.blockwise.source import Source, hollowed
from linearize.blockwise.states import (
    REFERENCE,
    BlockInputs,
    States,
    first_states,
    passed_on,
    reference_batches,
    write_states,
)
from linearize.blockwise.work import FinishedBlock, Work
from linearize.convert import convert
from linearize.cost import cost
from linearize.errors import ConvertError
from linearize.plan import Plan
from linearize.planning.by_budget import to_budget
from linearize.planning.job import Job
from linearize.planning.request import Request
from linearize.running.batches import Batch, ReadData
from linearize.running.models import device_of
from linearize.running.steps import Steps
from linearize.training.distance import real_loss
from linearize.zoo.hollow import without_cache

__all__ = ["Engine"]


@dataclass(frozen=True)
class Engine:
    """What a run works with.

    Attributes:
        source: of the blocks.
        model: with everything but its blocks.
        chain: of these.
        data: batches for the model.
        like: the hidden states of all batches, without values.
        work: the folder.
        share: what may remain.
        costs: of the blocks as they are, in the measure of the share.
        options: of `Request`, for every block.
        seed: of everything random.
        say: told what is going on.
    """

    source: Source
    model: nn.Module
    chain: BlockChain
    data: ReadData
    like: dict[str, Tensor]
    work: Work
    share: Share
    costs: list[int]
    options: dict[str, Any]
    seed: int
    say: Callable[[str], None]

    def run(self) -> list[FinishedBlock]:
        """Compress all blocks that no earlier run has finished.

        Raises:
            NotAChain: a block is not a function of its hidden state after all.
            LinearizeError: a block cannot be compressed.
        """
        notes = self.work.finished()
        if notes:
            self.say(f"{len(notes)} of {len(self.chain.blocks)} blocks are there already")
        else:
            self.work.start()
            write_states(self.work.states(0), self.like, self._first())
        for position in range(len(notes), len(self.chain.blocks)):
            note = self._block(position, notes)
            self.work.finish(position, note)
            notes.append(note)
            gc.collect()  # a block that is done is held by circles of hooks and modules, and is large
            self.say(f"{note.path}: {note.before} -> {note.after} parameters, error {note.error:.3g}")
        return notes

    def _first(self) -> Iterator[tuple[str, Tensor]]:
        """The states in front of the first block; those of the original model are the same there."""
        yield from first_states(self.model, self.chain, self.data)
        kept = set(self.references)
        for index, (name, state) in enumerate(first_states(self.model, self.chain, self.data)):
            if index in kept:
                yield name.replace("batch", REFERENCE), state

    @property
    def references(self) -> list[int]:
        """The batches whose original states are kept, too."""
        return reference_batches(sum(name.startswith("batch") for name in self.like))

    def _block(self, position: int, notes: list[FinishedBlock]) -> FinishedBlock:
        """Compress one block, and pass on what it makes."""
        start, path = time.perf_counter(), self.chain.blocks[position]
        states = States.read(self.work.states(position))
        inputs = BlockInputs(self.model, self.chain, self.data, path, states)
        block = self.source.block(path)
        done = [note.after if self.share.measure == "params" else note.flops_after for note in notes]
        with without_cache(block):
            small, plan, loss, told = self._compressed(block, inputs, self.share.of(self.costs, done))
            small = self.work.keep(position, small, hollowed(block)).to(device_of(block))
            some = some_inputs(inputs, self.references)
            error = real_loss(block, small, some)
            example = some[0].kwargs
            before, after = cost(block, example), cost(small, example)
        originals = BlockInputs(self.model, self.chain, self.data, path, states, self.references, REFERENCE)
        behind = joined(passed_on(small, self.chain, inputs), passed_on(block, self.chain, originals))
        write_states(self.work.states(position + 1), self.like, behind)
        return FinishedBlock(
            path, plan.to_json(), before.parameters, after.parameters, before.flops, after.flops, loss, error,
            self._drift(position + 1), time.perf_counter() - start, told,
        )  # fmt: skip

    def _compressed(
        self, block: nn.Module, inputs: BlockInputs, fraction: float
    ) -> tuple[nn.Module, Plan, float, tuple[str, ...]]:
        """A block within its budget, its plan, the predicted loss and remarks; itself, if nothing can be done to it."""
        example = next(iter(inputs)).kwargs
        try:
            gated = convert(block, example)
        except ConvertError as error:
            return block, Plan(()), 0.0, (str(error),)
        request = Request(**{**self.options, self.share.measure: fraction}, seed=self.seed, progress=False)
        steps, reading = Steps(progress=False), ReadData(block, inputs)
        job = Job(block, gated, reading, example, steps, request.training, _untrained, lean=True)
        made = to_budget(job, request)
        outcome = made.told["outcome"]
        notes = (*made.told["notes"], *(() if outcome.met else (str(outcome),)))
        return made.small, made.plan, sum(site.loss or 0.0 for site in made.plan.sites), notes

    def _drift(self, position: int) -> float:
        """Relative squared distance of hidden states from those of the original model."""
        states = States.read(self.work.states(position))
        off = size = 0.0
        for index in self.references:
            ours, original = states.of(index).double(), states.of(index, REFERENCE).double()
            off += float((ours - original).square().sum())
            size += float(original.square().sum())
        return off / max(size, 1e-300)


def some_inputs(inputs: BlockInputs, some: list[int]) -> list[Batch]:
    """Some batches of a block."""
    return list(BlockInputs(inputs.model, inputs.chain, inputs.data, inputs.path, inputs.states, some))


def _untrained(*_: Any) -> list[dict[str, float]]:
    return []
