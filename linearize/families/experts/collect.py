"""What data tells about experts: who is picked, what changes in the output without each, and what its channels are.

For each token that picks an expert, the mixture runs once more without it, on that token alone. So what stands in for
an expert counts, too: it matters little that an expert gives much if another one gives the same.

Shape letters: R tokens, S of them that are looked at, E experts, k picked, D features, O of what comes out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from linearize.families.experts.hidden import Bank
from linearize.families.experts.place import Experts
from linearize.families.experts.sums import ExpertSums
from linearize.families.experts.twin import call_argument, first_tensor, without_experts
from linearize.running.passes import Moment
from linearize.running.rows import row_weights, rows_of

__all__ = ["ExpertsCollector"]

_LOOKED = 1024  # tokens of a batch that are looked at
_RUNS = 8192  # rows that may run through a mixture of a list in a batch: all experts are taken from each token


@dataclass
class ExpertsCollector:
    """Watches a mixture and its experts, and takes experts from it, one by one."""

    place: Experts
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    kind: str = field(default="experts", init=False)
    gradients: bool = field(default=True, init=False)
    _seen: dict[str, Tensor] = field(default_factory=dict, init=False)
    _rows: dict[int, int] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        channels = 0 if self.place.channels is None else self.place.channels.width
        self.place.sums = self.place.sums or ExpertSums(self.place.count, self.place.shape[-1], channels, self.device)

    @property
    def name(self) -> str:
        """Path of the experts."""
        return self.place.name

    @property
    def sums(self) -> ExpertSums:
        """What was found."""
        found: ExpertSums = self.place.sums
        return found

    @property
    def memory(self) -> float:
        """The bytes that the sums take."""
        width = 0 if self.place.channels is None else self.place.channels.width
        return 8.0 * (self.place.shape[-1] ** 2 + self.place.count * (2 * self.place.count + width**2))

    def attach(self, now: Moment) -> Iterator[Any]:
        """Watch the mixture, and how its experts are called."""
        yield now.model.get_submodule(self.place.path).register_forward_hook(self._see(now), with_kwargs=True)
        bank = now.model.get_submodule(self.place.bank)
        if not self.place.listed:
            yield bank.register_forward_pre_hook(self._see_picks, with_kwargs=True)
        for number, expert in enumerate(bank.children() if self.place.listed else ()):
            yield expert.register_forward_pre_hook(self._count(number))

    def _see(self, now: Moment) -> Any:
        def see(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            self._seen["x"] = call_argument(args, kwargs, self.place.keyword or 0).detach()
            first = first_tensor(output)
            if first is None:
                return None
            self._seen["y"] = first.detach()
            watched = first + now.source.to(first.dtype)
            if not watched.requires_grad:  # the model's own code switches gradients off
                return None
            watched.register_hook(self._keep)
            return type(output)((watched, *output[1:])) if isinstance(output, (tuple, list)) else watched

        return see

    def _see_picks(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for name, key in zip(("input", "index", "weight"), self.place.given, strict=True):
            self._seen[name] = call_argument(args, kwargs, key).detach()

    def _count(self, number: int) -> Any:
        def see(_: nn.Module, args: tuple[Any, ...]) -> None:
            rows = args[0].shape[:-1].numel() if args and isinstance(args[0], Tensor) else 0
            self._rows[number] = self._rows.get(number, 0) + rows

        return see

    def _keep(self, gradient: Tensor) -> None:
        self._seen["gradient"] = gradient.detach()

    @torch.no_grad()
    def take(self, now: Moment) -> None:
        """Turn the batch into sums, and forget it."""
        self.sums.samples += now.positions
        if "y" in self._seen and (self.place.listed or "index" in self._seen):
            mask = now.mask(self.place.path)
            rows = {name: rows_of(value, 0, mask) for name, value in self._seen.items()}
            self._add(now, rows)
        self._seen.clear()
        self._rows.clear()

    def _add(self, now: Moment, rows: Mapping[str, Tensor]) -> None:
        sums, count, total = self.sums, self.place.count, len(rows["x"])
        most = min(_LOOKED, max(1, _RUNS // count) if self.place.listed else _LOOKED)
        chosen = torch.randperm(total, generator=now.generator(self.name))[:most].sort().values.to(rows["x"].device)
        some = {name: value[chosen] for name, value in rows.items()}
        sums.tokens += total
        sums.looked += len(chosen)
        if "gradient" in some:
            gradient = rows["gradient"].to(sums.rows)
            sums.sensitivity += gradient.t() @ gradient
            sums.energy += float(some["gradient"].double().square().sum())
        if self.place.listed:
            for number, seen in self._rows.items():
                sums.rows[number] += seen
            index = torch.arange(count, device=chosen.device).expand(len(chosen), count)
        else:
            sums.rows += torch.bincount(rows["index"].flatten(), minlength=count).to(sums.rows)
            index = some["index"]
            self._add_experts(now, some)
        if self.place.fixed is None:
            mixture = now.model.get_submodule(self.place.path)
            self._add_changes(some, index, changes_of(mixture, self.place, some["x"], some["y"], index))

    def _add_changes(self, some: Mapping[str, Tensor], index: Tensor, change: Tensor) -> None:
        """Take in what changes (S, k, O) without each of the experts that tokens pick."""
        sums = self.sums
        where = index[:, :, None].expand(-1, -1, index.shape[1]).to(sums.rows.device)
        both = where, where.transpose(1, 2)
        d = change.to(sums.rows)
        sums.change.index_put_(both, d @ d.transpose(1, 2), accumulate=True)
        if "gradient" in some:
            felt = (d @ some["gradient"].to(d)[:, :, None])[:, :, 0]
            sums.felt.index_put_(both, felt[:, :, None] * felt[:, None, :], accumulate=True)

    def _add_experts(self, now: Moment, some: Mapping[str, Tensor]) -> None:
        """Take in what experts give, and their channels."""
        sums, channels = self.sums, self.place.channels
        bank = Bank(now.model.get_submodule(self.place.bank), self.place)
        x, importance = some["input"], row_weights(some.get("gradient"))
        for index, weight in zip(some["index"].unbind(1), some["weight"].unbind(1), strict=True):
            w = weight.to(sums.rows)
            given = bank.given(x, index).to(sums.rows)
            at = index.to(sums.rows.device)
            sums.norms.index_add_(0, at, w.abs() * given.square().sum(1).sqrt())
            sums.power.index_add_(0, at, w.square())
            if channels is None:
                continue
            hidden = bank.channels(x, index, channels)
            counted = w.square() if importance is None else w.square() * importance.to(w)
            for expert in index.unique().tolist():
                own = index == expert
                sums.hidden[expert].update(hidden[own], counted[own.to(counted.device)])

    @property
    def finite(self) -> bool:
        """Whether all sums are finite."""
        return self.sums.finite

    def merge(self, other: ExpertsCollector) -> None:
        """Take in what another one found on other batches."""
        self.sums.merge(other.sums)

    def state(self) -> dict[str, Any]:
        """What was found."""
        return self.sums.state()

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take what `state` gave."""
        self.sums.restore(state)


def changes_of(mixture: nn.Module, place: Experts, x: Tensor, y: Tensor, index: Tensor) -> Tensor:
    """What changes in the output of a mixture without each of the experts that tokens pick: (S, k, O).

    Args:
        mixture: the module.
        place: as it is known in the model.
        x: tokens, (S, D).
        y: what the mixture gives for them, (S, O).
        index: (S, k) the experts.
    """
    found = y.new_zeros(*index.shape, y.shape[1])
    for expert in index.unique().tolist():
        row, slot = (index == expert).nonzero(as_tuple=True)
        twin = without_experts(mixture, place, (expert,))
        rows = x[row].view(*(1,) * (len(place.shape) - 2), len(row), x.shape[1])
        out = first_tensor(twin(**{place.keyword: rows}) if place.keyword else twin(rows))
        if out is not None:
            found[row, slot] = y[row] - out.flatten(0, -2)
    return found
