"""Find the chain of blocks of a model: modules called one after the other, each given what the one before gave back.

The blocks are found in the tree of modules, as the largest list of modules, and by a trial: stand-ins in their places
give random hidden states, and what each is told is looked at. A block is a function of its hidden state, whatever else
it is told, if that hidden state is what the stand-in before it gave, and if all else (masks, positions) is the same
whatever the stand-ins gave. No class is known by its name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from linearize.blockwise.told import BlockArguments, NotAChain, block_arguments
from linearize.nest import leaves_of
from linearize.running.batches import Batch
from linearize.running.models import evaluating
from linearize.zoo.hollow import without_cache

__all__ = ["BlockChain", "BlockOutput", "block_lists", "chain_of"]

_PLAIN = (type(None), bool, int, float, str)
_KNOWN = (*_PLAIN, Tensor, torch.dtype, torch.device)
_SHARE = 0.5  # of the weights outside embeddings that a chain must hold: else little would be gained


@dataclass(frozen=True)
class BlockOutput:
    """How a block gives its hidden state back.

    Attributes:
        index: where it stands in the output; None for an output that is the hidden state itself.
        length: of that output.
        kind: of that output: tuple or list.
    """

    index: int | None = None
    length: int = 0
    kind: type[Any] = tuple

    def wrap(self, hidden: Tensor) -> Any:
        """An output with this hidden state in it."""
        if self.index is None:
            return hidden
        return self.kind(hidden if i == self.index else None for i in range(self.length))

    def hidden(self, output: Any) -> Tensor:
        """The hidden state in an output.

        Examples:
            >>> BlockOutput(0, 2).hidden((torch.ones(1), None))
            tensor([1.])
        """
        found: Tensor = output if self.index is None else output[self.index]
        return found


@dataclass(frozen=True)
class BlockChain:
    """The blocks of a model.

    Attributes:
        blocks: paths, in the order in which they are called.
        hidden: the name of the argument that is the hidden state.
        form: of their outputs.
    """

    blocks: tuple[str, ...]
    hidden: str
    form: BlockOutput


def block_lists(model: nn.Module) -> list[tuple[str, ...]]:
    """The lists of modules that could be chains, as paths; the one with most weights first.

    Raises:
        NotAChain: there is none that holds at least half of the weights outside embeddings.

    Examples:
        >>> block_lists(nn.ModuleDict({"layers": nn.ModuleList(nn.Linear(4, 4) for _ in range(3))}))
        [('layers.0', 'layers.1', 'layers.2')]
    """
    tables = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    found: list[tuple[int, tuple[str, ...]]] = []
    total = _weights(model, tables)
    for path, module in model.named_modules():
        if not isinstance(module, nn.ModuleList | nn.Sequential) or len(module) < 2:
            continue
        size = _weights(module, tables)
        if size >= _SHARE * total:
            found.append((size, tuple(f"{path}.{name}".strip(".") for name, _ in module.named_children())))
    if not found:
        raise NotAChain(type(model).__name__, "found no list of modules that holds most of its weights")
    return [paths for _, paths in sorted(found, key=lambda item: -item[0])]


def _weights(module: nn.Module, apart: set[int]) -> int:
    return sum(p.numel() for p in module.parameters() if id(p) not in apart)


def chain_of(
    model: nn.Module,
    batch: Batch,
    block: Callable[[str], nn.Module],
    around: Callable[[Sequence[str]], nn.Module],
) -> tuple[BlockChain, nn.Module]:
    """The chain of a model, and the model around it.

    Args:
        model: it needs no weights.
        batch: one batch of the data.
        block: gives the block of a path, with weights.
        around: gives the model with everything but some blocks, given their paths.

    Raises:
        NotAChain: no list of modules is a chain. The reason is that of the largest.

    Examples:
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.Sequential(*(nn.Linear(3, 3) for _ in range(4))), nn.Linear(3, 2))
        >>> found, _ = chain_of(net, Batch((torch.randn(5, 2),)), net.get_submodule, lambda _: net)
        >>> found.blocks, found.hidden
        (('1.0', '1.1', '1.2', '1.3'), 'input')
    """
    reason: NotAChain | None = None
    for blocks in block_lists(model):
        try:
            _check_own(model, blocks)
            rest = around(blocks)
            return _tried(rest, blocks, batch, block(blocks[0])), rest
        except NotAChain as error:
            reason = reason or error
    raise reason or NotAChain(type(model).__name__, "found no chain of blocks")


def _check_own(model: nn.Module, blocks: Sequence[str]) -> None:
    """No block shares a weight with anything else."""
    holders: dict[int, str] = {}
    inside = {f"{path}.": path for path in blocks}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        holder = next((path for prefix, path in inside.items() if name.startswith(prefix)), "")
        other = holders.setdefault(id(parameter), holder)
        if other != holder:
            raise NotAChain(holder or other, f"shares the weight {name!r} with {other or 'the rest of the model'}")


def _tried(model: nn.Module, blocks: tuple[str, ...], batch: Batch, first: nn.Module) -> BlockChain:
    start = block_arguments(model, blocks, batch, None)[0]
    names = [name for name, value in start.items() if isinstance(value, Tensor) and value.is_floating_point()]
    if not names:
        raise NotAChain(blocks[0], "is given no tensor that could be a hidden state")
    hidden = names[0]
    with evaluating(model, first), without_cache(model), without_cache(first):
        form = _form(blocks[0], first(**start), start[hidden])
    runs = []
    for seed in (0, 1):
        generator = torch.Generator().manual_seed(seed)
        given = [torch.randn(start[hidden].shape, generator=generator).to(start[hidden]) for _ in blocks]
        seen = block_arguments(model, blocks, batch, [form.wrap(state) for state in given])
        _check_order(blocks, seen, hidden, [start[hidden], *given])
        runs.append(seen)
    _check_same(blocks, runs, hidden)
    return BlockChain(blocks, hidden, form)


def _form(path: str, output: Any, hidden: Tensor) -> BlockOutput:
    """The form of a block's output."""
    form = BlockOutput()
    if isinstance(output, tuple | list):
        tensors = [index for index, value in enumerate(output) if value is not None]
        if len(tensors) != 1:
            raise NotAChain(path, f"gives back {len(tensors)} things, not only a hidden state")
        form = BlockOutput(tensors[0], len(output), list if isinstance(output, list) else tuple)
        output = output[tensors[0]]
    if not isinstance(output, Tensor):
        raise NotAChain(path, f"gives back a {type(output).__name__}, not a hidden state")
    if output.shape != hidden.shape or output.dtype != hidden.dtype:
        found = f"makes {tuple(output.shape)} of {tuple(hidden.shape)}: its hidden state does not keep its shape"
        raise NotAChain(path, found)
    return form


def _check_order(blocks: Sequence[str], seen: Sequence[BlockArguments], hidden: str, given: Sequence[Tensor]) -> None:
    """Each block was called, and was given what the one before gave."""
    if len(seen) < len(blocks):
        raise NotAChain(blocks[len(seen)], "is not called on its data")
    for path, before, arguments, state in zip(blocks, ("", *blocks), seen, given, strict=False):
        found = arguments.get(hidden)
        if not isinstance(found, Tensor) or found.shape != state.shape or not torch.equal(found, state):
            raise NotAChain(path, f"is not given what {before or 'the model'} gave: something changes it in between")


def _check_same(blocks: Sequence[str], runs: Sequence[Sequence[BlockArguments]], hidden: str) -> None:
    """What else the blocks are told does not depend on hidden states."""
    for path, one, other in zip(blocks, *runs, strict=True):
        for name in one.keys() | other.keys():
            if name != hidden and not _equal(one.get(name), other.get(name)):
                raise NotAChain(path, f"is told {name!r}, which depends on what blocks before it gave")
            for where, value in leaves_of(one.get(name)):
                if not isinstance(value, _KNOWN):
                    place = f"{name}.{where}".strip(".")
                    raise NotAChain(path, f"is told {place!r}, a {type(value).__name__}, which may hold anything")


def _equal(one: Any, other: Any) -> bool:
    pairs = list(leaves_of(one)), list(leaves_of(other))
    if [where for where, _ in pairs[0]] != [where for where, _ in pairs[1]]:
        return False
    for (_, a), (_, b) in zip(*pairs, strict=True):
        same = torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else type(a) is type(b)
        if not same or (isinstance(a, _PLAIN) and a != b):
            return False
    return True
