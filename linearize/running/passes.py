"""One pass of a model over data, for as many statistics as fit into memory.

A collector says which modules it watches and what it takes from a batch. What all collectors need is here, once:
reading batches, devices, padding masks, the backward pass, checks for NaN, the progress bar, and continuing an
interrupted run.

Random draws depend only on the seed, the number of the batch and the collector's name. So the result does not depend on
which collectors share a pass, nor on how the batches are split: the parts merge to the whole.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from linearize.errors import DataError
from linearize.gating.gate import plain_activations
from linearize.running.batches import Batch, length_of, padding_mask, read_batches
from linearize.running.models import watching
from linearize.running.processes import everyone, from_first, place, same_model, share_of, together
from linearize.running.progress import progress_bar

__all__ = ["Collector", "Moment", "Probe", "StatisticsStore", "in_passes", "run_passes"]

Probe = Callable[[Any, Batch, torch.Generator], tuple[Tensor, int]]
"""Turns the output into a scalar, whose gradient is the effect of an error, and the number of positions summed over."""


@dataclass
class Moment:
    """What collectors know about the batch that runs through the model.

    Attributes:
        model: the model that runs.
        source: a zero that requires a gradient, if any collector asks for gradients. A hook that adds it to an output
            makes sure that a gradient arrives there.
        seed: of all random draws.
        index: number of the batch in the whole data.
        batch: inputs and labels, on the model's device.
        positions: number of rows that the probe sums over; 0 without gradients.
    """

    model: nn.Module
    source: Tensor
    seed: int
    index: int = 0
    batch: Batch = field(default_factory=Batch)
    positions: int = 0

    def generator(self, name: str) -> torch.Generator:
        """Random numbers that belong to this batch and this name.

        Examples:
            >>> now = Moment(nn.Identity(), torch.zeros(()), seed=0, index=3)
            >>> [torch.rand(1, generator=now.generator("a")).item() for _ in range(2)]  # doctest: +ELLIPSIS
            [0.543..., 0.543...]
        """
        told = hashlib.sha256(f"{self.seed} {self.index} {name}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(told[:7], "big"))

    def mask(self, path: str) -> Tensor | None:
        """The padding mask (B, T) that belongs to a place in the model, if the batch has one."""
        return padding_mask(self.model, path, self.batch.masks)


class Collector(Protocol):
    """Statistics of one place, gathered batch by batch.

    Attributes:
        kind: kind and name together identify the collector, here and in the notes of an interrupted run.
    """

    kind: str

    @property
    def name(self) -> str:
        """The name of the place."""

    @property
    def gradients(self) -> bool:
        """Whether it needs the gradient of the output's probe."""

    @property
    def memory(self) -> float:
        """Bytes that its sums take."""

    def attach(self, now: Moment) -> Iterable[Any]:
        """Put hooks on the model, and return their handles."""

    def take(self, now: Moment) -> None:
        """Add what the hooks saw of a batch to the sums, and release it."""

    @property
    def finite(self) -> bool:
        """Whether all sums are finite."""

    def merge(self, other: Any) -> None:
        """Add the sums of another collector of the same place, from other batches."""

    def state(self) -> dict[str, Any]:
        """The sums, as plain values and tensors."""

    def restore(self, state: Mapping[str, Any]) -> None:
        """Restore the sums from the result of `state`."""


class StatisticsStore(Protocol):
    """Stores finished statistics, for a run that continues later."""

    def some(self, kind: str, names: Iterable[str]) -> dict[str, Any]:
        """The stored statistics of a kind, by name."""

    def write(self, kind: str, noted: Mapping[str, Any]) -> None:
        """Store statistics of a kind, by name."""


def run_passes(
    model: nn.Module,
    batches: Iterable[Any],
    collectors: Sequence[Collector],
    *,
    probe: Probe | None = None,
    indices: Iterable[int] | None = None,
    seed: int = 0,
    memory: float = 2e9,
    label: str = "observe",
    progress: bool = True,
    store: StatisticsStore | None = None,
) -> None:
    """Run a model over data, so that collectors gather statistics. Several passes are used if memory is too small.

    The model runs in eval mode and is not changed.

    Args:
        model: any model.
        batches: batches that can be read several times, as `linearize.running.batches` describes them.
        collectors: the statistics to gather. A collector that is in `store` is filled from there.
        probe: gives the gradients that collectors ask for; None gives none, and the model runs forwards only.
        indices: numbers of the batches in the whole data, where these are only a part of it; None counts from 0.
        seed: of random draws.
        memory: bytes for the sums of one pass. Further collectors wait for another pass.
        label: of the progress bar.
        progress: show a bar on a terminal.
        store: statistics of an interrupted run. The result of each pass is added.

    Raises:
        DataError: there are no batches, one does not go through the model, or NaN or infinity turns up (the place is
            named).
    """
    todo = _unknown(collectors, store)
    same_model(model)
    batches, number = share_of(batches, None if indices is None else list(indices))
    for some in in_passes(todo, memory):
        with together():
            count = _run(model, batches, number, some, probe, seed, label, progress=progress and place()[0] == 0)
        if not sum(everyone(count)):
            remedy = "Pass at least one (a generator is empty after its first use)."
            raise DataError("data", "found no batches", remedy)
        _merge(model, some)
        if store is not None and place()[0] == 0:
            for kind in dict.fromkeys(collector.kind for collector in some):
                store.write(kind, {c.name: c.state() for c in some if c.kind == kind})


def _unknown(collectors: Sequence[Collector], store: StatisticsStore | None) -> list[Collector]:
    """The collectors that have to run; the others take what is known."""
    if store is None:
        return list(collectors)
    todo = []
    for kind in dict.fromkeys(collector.kind for collector in collectors):
        same = [collector for collector in collectors if collector.kind == kind]
        known = from_first(lambda: store.some(kind, [collector.name for collector in same]))  # noqa: B023 - at once
        for collector in same:
            if collector.name in known:
                collector.restore(known[collector.name])
            else:
                todo.append(collector)
    return todo


def _merge(model: nn.Module, collectors: Sequence[Collector]) -> None:
    """Take in what other processes found, in the order of the ranks: all come to the very same sums."""
    if place()[1] == 1:
        return
    first, *others = everyone([collector.state() for collector in collectors])
    for position, collector in enumerate(collectors):
        more = [copy.deepcopy(collector, {id(part): part for part in model.modules()}) for _ in others]
        collector.restore(first[position])
        for other, states in zip(more, others, strict=True):
            other.restore(states[position])
            collector.merge(other)


def in_passes(collectors: Iterable[Collector], memory: float) -> Iterator[list[Collector]]:
    """The collectors in groups whose sums fit into a number of bytes, at least one in each group."""
    group, used = list[Collector](), 0.0
    for collector in collectors:
        if group and used + collector.memory > memory:
            yield group
            group, used = [], 0.0
        group.append(collector)
        used += collector.memory
    if group:
        yield group


def _run(
    model: nn.Module,
    batches: Iterable[Any],
    number: Callable[[int], int],
    collectors: Sequence[Collector],
    probe: Probe | None,
    seed: int,
    label: str,
    *,
    progress: bool,
) -> int:
    """Run the model over the batches, and say how many there were."""
    gradients = probe is not None and any(collector.gradients for collector in collectors)
    now = Moment(model, torch.zeros(()), seed)
    total = length_of(batches)

    def attach(source: Tensor) -> Iterator[Any]:
        now.source = source
        for collector in collectors:
            yield from collector.attach(now)

    count = 0
    with (
        watching(model, attach, gradients=gradients),
        plain_activations(model),
        progress_bar(label, total, enabled=progress) as advance,
    ):
        for index, batch in enumerate(read_batches(model, batches)):
            now.index = number(index)
            now.batch = batch
            output = batch.checked(model, now.index)
            if gradients and probe is not None:
                scalar, now.positions = probe(output, now.batch, now.generator("probe"))
                if scalar.requires_grad:
                    torch.autograd.grad(scalar, now.source, allow_unused=True)
            del output
            for collector in collectors:
                collector.take(now)
                if not collector.finite:
                    remedy = "Check this batch, and the weights before this site."
                    found = f"found NaN or infinity at this activation in batch {now.index}"
                    raise DataError(collector.name, found, remedy)
            count += 1
            advance("")
    return count
