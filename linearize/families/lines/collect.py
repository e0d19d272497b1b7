"""The sensitivity of the output to an error in each channel: the diagonal of its Gauss-Newton matrix.

Shape letters: C channels, R rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from linearize.gating.gate import ChannelGate
from linearize.running.passes import Moment
from linearize.running.rows import rows_of

__all__ = ["UnitCollector", "sensitivities_of"]


@dataclass
class UnitCollector:
    """Sums of squared gradients at the output of one gate.

    Attributes:
        name: of the site.
        gate: the gate.
        total: (C,) float64, on the CPU.
        samples: rows of the probe that were summed over.
    """

    name: str
    gate: ChannelGate
    total: Tensor = field(init=False)
    samples: float = 0.0
    kind: str = field(default="unit", init=False)
    gradients: bool = field(default=True, init=False)
    _seen: list[Tensor] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        self.total = torch.zeros(self.gate.channels, dtype=torch.float64)

    @property
    def memory(self) -> float:
        """Bytes that the sums take."""
        return 8.0 * self.gate.channels

    def attach(self, now: Moment) -> Iterator[Any]:
        """Watch the gate's output."""

        def see(_: nn.Module, __: Any, output: Tensor) -> Tensor:
            output = output + now.source.to(output.dtype)
            if output.requires_grad:
                output.register_hook(lambda gradient: self._seen.append(gradient.detach()))
            return output

        yield self.gate.register_forward_hook(see)

    def take(self, now: Moment) -> None:
        """Add the batch's gradients to the sums, and release them."""
        self.samples += now.positions
        for gradient in self._seen:
            g = rows_of(gradient, -self.gate.axis - 1, now.mask(self.name))
            self.total += g.float().square().sum(0).double().cpu()
        self._seen.clear()

    @property
    def finite(self) -> bool:
        """Whether all sums are finite."""
        return bool(self.total.isfinite().all())

    def merge(self, other: UnitCollector) -> None:
        """Add the sums of another collector, from other batches."""
        self.total = self.total + other.total
        self.samples += other.samples

    def state(self) -> dict[str, Any]:
        """The sums, as plain values and tensors."""
        return {"total": self.total, "samples": self.samples}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Restore the result of `state`."""
        self.total, self.samples = state["total"].clone(), state["samples"]


def sensitivities_of(collectors: Sequence[UnitCollector]) -> dict[str, Tensor]:
    """The result of the collectors by site name. All are 1, so that all count alike, if no gradient arrived."""
    if not any(bool((collector.total > 0).any()) for collector in collectors):
        return {collector.name: torch.ones_like(collector.total) for collector in collectors}
    return {collector.name: collector.total / max(1, collector.samples) for collector in collectors}
