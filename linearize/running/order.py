"""The order of the data: its epoch, its random generators, and passes that all start in the same state."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch

from linearize.running.batches import count_of
from linearize.running.randomness import seed_everything

__all__ = ["Repeated", "generators_of", "set_epoch"]


def _holders(data: Any) -> list[Any]:
    """A loader and its samplers."""
    batched = getattr(data, "batch_sampler", None)
    holders = [data, getattr(data, "sampler", None), batched, getattr(batched, "sampler", None)]
    return [holder for holder in holders if holder is not None]


def set_epoch(data: Any, epoch: int) -> None:
    """Tell data, and the samplers of a loader, which epoch the next pass is, counted from 0."""
    for holder in {id(holder): holder for holder in _holders(data)}.values():
        tell = getattr(holder, "set_epoch", None)
        if callable(tell):
            tell(epoch)


def generators_of(data: Any) -> list[torch.Generator]:
    """The random generators that a loader and its samplers own; the global ones are kept elsewhere."""
    found = {id(g): g for g in (getattr(holder, "generator", None) for holder in _holders(data)) if g is not None}
    return [generator for generator in found.values() if isinstance(generator, torch.Generator)]


class Repeated:
    """Data whose passes all start in the same state: epoch 0, with the same generators and seeds.

    So it does not matter to a pass which others came before, in this process or in one that was interrupted.

    Args:
        data: re-iterable batches.
        seed: of the global random generators at the start of each pass.

    Examples:
        >>> from torch.utils.data import DataLoader
        >>> data = Repeated(DataLoader(torch.arange(6), batch_size=6, shuffle=True), seed=0)
        >>> [x.tolist() for x in data] == [x.tolist() for x in data]
        True
    """

    def __init__(self, data: Iterable[Any], seed: int) -> None:
        self.data, self.seed = data, seed
        self.dataset = getattr(data, "dataset", None)
        self._states = [generator.get_state() for generator in generators_of(data)]
        self._length: int | None = None

    def start(self) -> None:
        """Put the data and the global random generators into the state in which each pass starts."""
        set_epoch(self.data, 0)
        for generator, state in zip(generators_of(self.data), self._states, strict=True):
            generator.set_state(state)
        seed_everything(self.seed)

    def restore(self) -> None:
        """Put the data's own generators back to where they were."""
        for generator, state in zip(generators_of(self.data), self._states, strict=True):
            generator.set_state(state)

    def __len__(self) -> int:
        if self._length is None:
            self._length = count_of(self.data)
        return self._length

    def __iter__(self) -> Iterator[Any]:
        self.start()
        yield from self.data
