"""The hidden states of all batches in front of one block, in a file that is mapped into memory.

They are all that crosses the border of a block. The system keeps in memory what there is room for, and a run that was
killed finds them again. Of a few batches there are also the states that the original model would have here, to tell how
far the compressed one has gone from it.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from linearize.blockwise.chain import BlockChain
from linearize.blockwise.told import NotAChain, block_arguments
from linearize.errors import DataError, UsageError
from linearize.running.batches import Batch, to_device
from linearize.running.models import device_of, evaluating
from linearize.storage import tensorfile
from linearize.zoo.hollow import without_cache

__all__ = [
    "REFERENCE",
    "BlockInputs",
    "States",
    "check_room",
    "first_states",
    "hollow_states",
    "passed_on",
    "reference_batches",
    "write_states",
]

REFERENCE = "reference"
_FEW = 4  # batches whose original states are kept, too


@dataclass(frozen=True)
class States:
    """The states in front of a block.

    Attributes:
        path: of the file.
        tensors: mapped from it.
    """

    path: Path
    tensors: dict[str, Tensor]

    @classmethod
    def read(cls, path: Path) -> States:
        """Map a file.

        Raises:
            CheckpointError: there is none, or it is damaged.
        """
        tensorfile.read_header(path)
        return cls(path, tensorfile.read_tensors(path, "cpu"))

    def of(self, index: int, kind: str = "batch") -> Tensor:
        """The hidden state of a batch."""
        return self.tensors[_name(kind, index)]


def _name(kind: str, index: int) -> str:
    return f"{kind}-{index:09d}"


class BlockInputs:
    """What one block is given for each batch of the data: its hidden state, and whatever else the model tells it.

    Args:
        model: everything but its blocks has weights.
        chain: of its blocks.
        data: of the model, re-iterable.
        path: of the block.
        states: in front of it.
        only: indices of the batches; None takes all.
        kind: of the states.
    """

    def __init__(
        self,
        model: nn.Module,
        chain: BlockChain,
        data: Iterable[Batch],
        path: str,
        states: States,
        only: Sequence[int] | None = None,
        kind: str = "batch",
    ) -> None:
        self.model, self.chain, self.data, self.states, self.kind = model, chain, data, states, kind
        self.path = path
        self.position = chain.blocks.index(path)
        count = sum(name.startswith("batch") for name in states.tensors)
        self.only = list(range(count)) if only is None else list(only)

    def __len__(self) -> int:
        return len(self.only)

    def __iter__(self) -> Iterator[Batch]:
        wanted = set(self.only)
        blocks = self.chain.blocks[: self.position + 1]
        for index, batch in enumerate(self.data):
            if index in wanted:
                state = self.states.of(index, self.kind)
                outputs = [self.chain.form.wrap(state)] * len(blocks)
                arguments = block_arguments(self.model, blocks, batch, outputs)[-1]
                yield Batch((), {**arguments, self.chain.hidden: state}, masks=batch.masks)


def reference_batches(count: int) -> list[int]:
    """The batches whose original states are kept: a few, spread over the data.

    Examples:
        >>> reference_batches(3), reference_batches(10)
        ([0, 1, 2], [0, 2, 4, 6])
    """
    return list(range(0, count, max(1, count // _FEW)))[:_FEW]


def hollow_states(model: nn.Module, chain: BlockChain, data: Iterable[Batch]) -> dict[str, Tensor]:
    """The states of all batches without their values, and again those whose original states are kept."""
    found = [start.to("meta") for _, start in first_states(model, chain, data)]
    made = {_name("batch", index): state for index, state in enumerate(found)}
    return made | {_name(REFERENCE, index): found[index] for index in reference_batches(len(found))}


def check_room(folder: Path, like: dict[str, Tensor], results: int) -> None:
    """Check that the states before and behind a block fit on the disk, together with the results.

    Args:
        folder: where they will be.
        like: the states, with or without values.
        results: bytes of the compressed model, twice: block by block, and put together.

    Raises:
        UsageError: there is not enough space; says how much is needed, and for how much of the data there is.
    """
    free = shutil.disk_usage(folder).free
    states = 2 * sum(tensor.nbytes for tensor in like.values())
    if states + results <= free:
        return
    batches = sum(name.startswith("batch") for name in like)
    fits = max(0, int(batches * (free - results) / max(1, states)))
    found = f"found {_size(free)} free, and {_size(states + results)} are needed: {_size(states)} for hidden states of "
    found += f"{batches} batches, before and behind a block, and {_size(results)} for the results"
    fewer = f"Pass at most {fits} of these batches, or free some space" if fits else "Free some space"
    raise UsageError(str(folder), found, f"{fewer}, or choose another folder.")


def _size(count: float) -> str:
    return f"{count / 1e9:.2f} GB"


def write_states(path: Path, like: dict[str, Tensor], values: Iterator[tuple[str, Tensor]]) -> None:
    """Write states one after the other, as they are made.

    Args:
        path: of the file.
        like: their shapes and dtypes, by name.
        values: their names and values, in alphabetical order.

    Raises:
        CheckpointError: the file cannot be written.
    """

    def value(name: str) -> Tensor:
        made, tensor = next(values)
        if made != name:
            raise DataError("data", f"gave {made} where {name} came before", "Pass data that are the same each time.")
        return tensor

    tensorfile.write_tensors(path, like, {}, value)


def first_states(model: nn.Module, chain: BlockChain, data: Iterable[Batch]) -> Iterator[tuple[str, Tensor]]:
    """The states in front of the first block."""
    for index, batch in enumerate(data):
        yield _name("batch", index), block_arguments(model, chain.blocks, batch, None)[0][chain.hidden]


def passed_on(block: nn.Module, chain: BlockChain, inputs: BlockInputs) -> Iterator[tuple[str, Tensor]]:
    """The states behind a block.

    Raises:
        NotAChain: a state does not keep its shape.
        DataError: a state is not finite.
    """
    path = chain.blocks[inputs.position]
    with evaluating(block), without_cache(block):
        for index, given in zip(inputs.only, inputs, strict=True):
            batch = to_device(given, device_of(block))
            output = _hidden(batch.checked(block, index), chain, path)
            state = batch.kwargs[chain.hidden]
            if output.shape != state.shape or output.dtype != state.dtype:
                raise NotAChain(path, f"makes {tuple(output.shape)} of {tuple(state.shape)}")
            if not bool(output.isfinite().all()):
                raise DataError(path, f"found NaN or infinity behind it, in batch {index}", "Check this batch.")
            yield _name(inputs.kind, index), output


def _hidden(output: Any, chain: BlockChain, path: str) -> Tensor:
    try:
        found = chain.form.hidden(output)
    except (TypeError, IndexError, KeyError) as error:
        raise NotAChain(path, f"gives back a {type(output).__name__}, unlike the blocks before it") from error
    if not isinstance(found, Tensor):
        raise NotAChain(path, f"gives back a {type(found).__name__}, unlike the blocks before it")
    return found
