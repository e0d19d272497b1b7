"""Several processes that work on one model together, as `torchrun` and `accelerate launch` start them.

Every process runs the same program. The batches are shared out, what the processes find is merged in the order of their
ranks, and what is measured (a time, a loss of a trial) is measured by the first one and told to the others. So all of
them decide alike. With one process, nothing here does anything.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import distributed, nn

from linearize.errors import LinearizeError, UsageError
from linearize.nest import leaves_of

__all__ = ["agreed", "everyone", "from_first", "place", "same_model", "share_of", "together"]

T = TypeVar("T")


def place() -> tuple[int, int]:
    """The rank of this process, and how many there are.

    Examples:
        >>> place()
        (0, 1)
    """
    if not (distributed.is_available() and distributed.is_initialized()):
        return 0, 1
    return distributed.get_rank(), distributed.get_world_size()


def everyone(value: T) -> list[T]:
    """Gather a value from all processes, in the order of their ranks. All of them must call this at the same point.

    Raises:
        UsageError: a process has died.
    """
    _, count = place()
    if count == 1:
        return [value]
    found: list[Any] = [None] * count
    try:
        distributed.all_gather_object(found, value)
    except RuntimeError as error:
        raise _died(error) from error
    return found


def from_first(make: Callable[[], T]) -> T:
    """What the first process makes; the others wait for it, and do not make it.

    Raises:
        UsageError: the first process could not make it, or a process has died.

    Examples:
        >>> from_first(lambda: 3)
        3
    """
    rank, count = place()
    if count == 1:
        return make()
    told: list[Any] = [None]
    with together():
        if rank == 0:
            told = [make()]
    try:
        distributed.broadcast_object_list(told, src=0)
    except RuntimeError as error:
        raise _died(error) from error
    made: T = told[0]
    return made


@contextmanager
def together() -> Iterator[None]:
    """An error in one process is an error in all: none waits for another that has given up.

    Raises:
        UsageError: another process has raised an error.
    """
    rank, count = place()
    if count == 1:
        yield
        return
    own: Exception | None = None
    try:
        yield
    except Exception as error:
        own = error
    told = everyone(None if own is None else f"{type(own).__name__}: {own}")
    if own is not None:
        raise own
    other = next(((n, text) for n, text in enumerate(told) if text is not None), None)
    if other is not None:
        raise UsageError(f"process {other[0]}", f"raised {other[1]}", f"Mend it there; process {rank} is as it was.")


def agreed(value: T, what: str, remedy: str) -> T:
    """The value, which must be the same in all processes.

    Raises:
        UsageError: it is not.
    """
    told = everyone(value)
    if any(other != told[0] for other in told):
        found = f"found {what} that differ between processes: {'; '.join(map(str, told))[:300]}"
        raise UsageError("processes", found, remedy)
    return value


def share_of(
    batches: Iterable[Any], numbers: Sequence[int] | None = None
) -> tuple[Iterable[Any], Callable[[int], int]]:
    """The batches that this process reads, and a function that gives their numbers in the whole data.

    Where all processes were given the same data (their first batches are equal), each takes its turn: process r of n
    the batches r, n + r, 2 n + r. Where each was given a share, by a distributed sampler, it reads all of that.

    Args:
        batches: re-iterable.
        numbers: of the batches, if they are a part of the data already.
    """
    rank, count = place()
    own: Callable[[int], int] = (lambda index: index) if numbers is None else numbers.__getitem__
    if count == 1:
        return batches, own
    told = everyone(_fingerprint(next(iter(batches), None)))
    if any(other != told[0] for other in told):  # every process has its own share
        return batches, (lambda index: index * count + rank) if numbers is None else own
    return _EveryNth(batches, rank, count), lambda index: own(index * count + rank)


class _EveryNth:
    """Every n-th of some batches, from the r-th on."""

    def __init__(self, batches: Iterable[Any], rank: int, count: int) -> None:
        self.batches, self.rank, self.count = batches, rank, count

    def __iter__(self) -> Iterator[Any]:
        return (batch for index, batch in enumerate(self.batches) if index % self.count == self.rank)


def same_model(model: nn.Module) -> None:
    """Compare a model with that of the other processes.

    Raises:
        UsageError: it has other weights there.
    """
    if place()[1] > 1:
        agreed(_digits(model), "weights", "Give all processes the same model: set a seed, or load it from one file.")


def _digits(model: nn.Module) -> str:
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        shape = f"{name} {tuple(tensor.shape)} {tensor.dtype}"
        value = "" if tensor.is_meta else float(tensor.detach().double().abs().sum())
        digest.update(f"{shape} {value}".encode())
    return digest.hexdigest()[:16]


def _fingerprint(batch: Any) -> str:
    digest = hashlib.sha256()
    for name, leaf in leaves_of(batch):
        if isinstance(leaf, torch.Tensor):
            digest.update(f"{name} {tuple(leaf.shape)}".encode())
            digest.update(leaf.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        elif isinstance(leaf, (int, float, str, bool, type(None))):
            digest.update(f"{name} {leaf}".encode())
    return digest.hexdigest()


def _died(error: Exception) -> LinearizeError:
    first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return UsageError("processes", f"found that another process is gone ({first[:200]})", "Start all of them again.")
