"""What data tells about heads: the covariance of them side by side, and what an error behind the projection costs.

Shape letters: F inputs and O outputs of the output projection, R rows (positions).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from linearize.algebra.covariance import Covariance
from linearize.families.heads.place import Heads
from linearize.running.passes import Moment
from linearize.running.rows import row_weights, rows_of

__all__ = ["HeadsCollector"]


@dataclass
class HeadsCollector:
    """Takes what the output projection of an attention reads, and the gradient of what it gives."""

    place: Heads
    outputs: int
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    kind: str = field(default="heads", init=False)
    gradients: bool = field(default=True, init=False)
    _h: Tensor | None = field(default=None, init=False)
    _gradient: Tensor | None = field(default=None, init=False)

    @property
    def name(self) -> str:
        """Path of the projection."""
        return self.place.name

    @property
    def memory(self) -> float:
        """The bytes that the sums take."""
        return 8.0 * (self.place.out.total**2 + self.outputs**2)

    def attach(self, now: Moment) -> Iterator[Any]:
        """Watch the projection."""
        yield now.model.get_submodule(self.place.name).register_forward_hook(self._see(now))

    def _see(self, now: Moment) -> Any:
        def see(_: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor | None:
            self._h = inputs[0].detach()
            output = output + now.source.to(output.dtype)
            if not output.requires_grad:  # the model's own code switches gradients off
                return None
            output.register_hook(self._keep)
            return output

        return see

    def _keep(self, gradient: Tensor) -> None:
        self._gradient = gradient.detach()

    @torch.no_grad()
    def take(self, now: Moment) -> None:
        """Turn the batch into rows, and forget it."""
        place = self.place
        place.seen += now.batch.size
        place.samples += now.positions
        if self._h is None:
            return
        mask = now.mask(self.name)
        h = rows_of(self._h, 0, mask)
        gradient = None if self._gradient is None else rows_of(self._gradient, 0, mask)
        weights = row_weights(gradient)
        place.rows = place.rows or Covariance(h.shape[1], self.device)
        place.rows.update(h, weights if weights is not None and len(weights) == len(h) else None)
        if gradient is not None:
            g = gradient.to(place.rows.mean)
            total = g.t() @ g
            place.sensitivity = total if place.sensitivity is None else place.sensitivity + total
        self._h = self._gradient = None

    @property
    def finite(self) -> bool:
        """Whether all sums are finite."""
        return self.place.rows is None or self.place.rows.finite

    def merge(self, other: HeadsCollector) -> None:
        """Take in what another one found on other batches."""
        self.place.merge(other.place)

    def state(self) -> dict[str, Any]:
        """What was found."""
        return self.place.state()

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take what `state` gave."""
        self.place.restore(state, self.device)
