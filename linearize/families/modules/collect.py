"""Statistics of whole modules: the covariance of (input, output), and the sensitivity to an error in the output.

Shape letters: I inputs and O outputs of the module, R rows (positions).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from linearize.algebra.covariance import Covariance
from linearize.families.modules.place import Whole
from linearize.running.passes import Moment
from linearize.running.rows import Wanted, rows_of

__all__ = ["ModuleCollector"]


@dataclass
class ModuleCollector:
    """Takes rows of a module's input and output as they pass, because later code may overwrite them."""

    whole: Whole
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    kind: str = field(default="module", init=False)
    gradients: bool = field(default=True, init=False)
    _seen: tuple[Tensor, Tensor] | None = field(default=None, init=False)

    @property
    def name(self) -> str:
        """Path of the module."""
        return self.whole.path

    @property
    def memory(self) -> float:
        """Bytes that the sums take."""
        return 8.0 * ((self.whole.inputs + self.whole.outputs) ** 2 + self.whole.outputs**2)

    def attach(self, now: Moment) -> Iterator[Any]:
        """Watch the module's input and output."""
        module = now.model.get_submodule(self.whole.path)
        yield module.register_forward_pre_hook(self._begin(now), with_kwargs=True)
        yield module.register_forward_hook(self._end(now))

    def _begin(self, now: Moment) -> Callable[[nn.Module, tuple[Any, ...], Mapping[str, Any]], None]:
        @torch.no_grad()
        def see(_: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            given = args[0] if args else kwargs[self.whole.keyword]
            rows = self._rows(given.detach(), now)
            images = len(given)
            count = Wanted(now.index, self.whole.inputs).of(images, -(-len(rows) // max(1, images))) * images
            chosen = torch.randperm(len(rows), generator=now.generator(self.name))[:count].to(rows.device)
            self._seen = rows[chosen].clone(), chosen

        return see

    def _end(self, now: Moment) -> Callable[[nn.Module, Any, Any], Any]:
        def see(_: nn.Module, __: Any, given: Any) -> Any:
            output = given[0] if self.whole.nones else given
            self._count(output.detach(), now)
            output = output + now.source.to(output.dtype)
            if output.requires_grad:
                output.register_hook(lambda gradient: self._weigh(gradient, now))
            return (output, *given[1:]) if self.whole.nones else output

        return see

    @torch.no_grad()
    def _count(self, output: Tensor, now: Moment) -> None:
        if self._seen is None:
            return
        inputs, chosen = self._seen
        rows = torch.cat((inputs, self._rows(output, now)[chosen]), 1)
        self.whole.rows = self.whole.rows or Covariance(rows.shape[1], rows.device)
        self.whole.rows.update(rows)

    @torch.no_grad()
    def _weigh(self, gradient: Tensor, now: Moment) -> None:
        if self.whole.rows is None:
            return
        g = self._rows(gradient, now).to(self.whole.rows.mean)  # float64, which not every device has
        total = g.t() @ g
        self.whole.sensitivity = total if self.whole.sensitivity is None else self.whole.sensitivity + total

    def _rows(self, x: Tensor, now: Moment) -> Tensor:
        return rows_of(x, -1 - self.whole.axis, now.mask(self.whole.path))

    def take(self, now: Moment) -> None:
        """Release the batch."""
        self.whole.samples += now.positions
        self._seen = None

    @property
    def finite(self) -> bool:
        """Always True: a module with NaN in it gets no map, but does not stop the pass."""
        return True

    def merge(self, other: ModuleCollector) -> None:
        """Add the sums of another collector, from other batches."""
        self.whole.merge(other.whole)

    def state(self) -> dict[str, Any]:
        """The sums, as plain values and tensors."""
        return self.whole.state()

    def restore(self, state: Mapping[str, Any]) -> None:
        """Restore the result of `state`."""
        self.whole.restore(state, self.device)
