"""What each block of a model is told: the arguments that the model calls it with, while stand-ins are in the places."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from linearize.errors import LinearizeError, UsageError
from linearize.running.batches import Batch
from linearize.running.models import evaluating
from linearize.zoo.hollow import without_cache

__all__ = ["BlockArguments", "NotAChain", "block_arguments"]

BlockArguments = dict[str, Any]


class NotAChain(UsageError):
    """The model is no chain of blocks, for the reason that this says."""

    def __init__(self, where: str, found: str) -> None:
        super().__init__(where, found, "Compress it as a whole, with linearize.compress.")


class _Enough(BaseException):
    """Leaves a forward when nothing more is to be learnt from it; no code on the way may take it for an error."""


@torch.no_grad()
def block_arguments(
    model: nn.Module, blocks: Sequence[str], batch: Batch, outputs: Sequence[Any] | None
) -> list[BlockArguments]:
    """What each block is told when the model runs on a batch: its arguments by name.

    Nothing of a block runs. Behind the last block the run is left.

    Args:
        model: its blocks may be without weights.
        blocks: their paths, in order.
        batch: of the data.
        outputs: what each is taken to give; None leaves the run at the first block.

    Raises:
        NotAChain: the blocks are called in another order, or twice, or with arguments that have no names.
        DataError: the batch does not go through the model.
    """
    seen: list[BlockArguments] = []

    def see(path: str, arguments: BlockArguments) -> Any:
        if path != blocks[len(seen)]:
            raise NotAChain(path, f"is called where {blocks[len(seen)]} was expected: not one after the other")
        seen.append(arguments)
        if outputs is None or len(seen) == len(blocks):
            raise _Enough
        return outputs[len(seen) - 1]

    with evaluating(model), without_cache(model), _stand_ins(model, blocks, see):
        try:
            batch.checked(model, 0)
        except _Enough:
            pass
        except LinearizeError as error:
            if not isinstance(error, NotAChain) and seen:
                why = error.found.rpartition("(")[2].rstrip(")")
                raise NotAChain(blocks[0], f"the model does not run with stand-ins for its blocks ({why})") from error
            raise
    return seen


@contextmanager
def _stand_ins(model: nn.Module, blocks: Sequence[str], see: Callable[[str, BlockArguments], Any]) -> Iterator[None]:
    """Inside this context, calling a block only tells its arguments. Its attributes can still be read."""
    held = [(model.get_submodule(path), path) for path in blocks]
    before = [vars(block).get("forward") for block, _ in held]
    try:
        for block, path in held:
            vars(block)["forward"] = _teller(path, inspect.signature(block.forward), see)
        yield
    finally:
        for (block, _), forward in zip(held, before, strict=True):
            if forward is None:
                vars(block).pop("forward", None)
            else:
                vars(block)["forward"] = forward


def _teller(path: str, signature: inspect.Signature, see: Callable[[str, BlockArguments], Any]) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs).arguments
        found: BlockArguments = {}
        for name, value in bound.items():
            kind = signature.parameters[name].kind
            if kind in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.POSITIONAL_ONLY) and value != ():
                raise NotAChain(path, f"takes {name!r} by position only")
            found |= value if kind is inspect.Parameter.VAR_KEYWORD else {name: value}
        return see(path, found)

    return forward
