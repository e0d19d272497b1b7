"""What a pass over the data found at a site.

Shape letters: I inputs, C channels, g features per channel, O outputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from linearize.algebra.covariance import Covariance
from linearize.families.channels.editable import Consumer, bias_of, columns_of
from linearize.sites.site import Site


@dataclass
class Observation:
    """The statistics of a site.

    Attributes:
        site: the site.
        inputs: I, or 0 where no skip is possible.
        group: g.
        consumers: the maps that read the channels.
        rows: covariance of (x, h).
        sensitivity: G, (O, O) float64, summed over the rows of a sample; identity if no gradient came.
        samples: rows per sample of the sensitivity's unit are `rows.count / samples`.
        shape: of the site's input in the first batch.
    """

    site: Site
    inputs: int
    group: int
    consumers: tuple[Consumer, ...]
    rows: Covariance
    sensitivity: Tensor
    samples: float = 0.0
    seen: int = 0
    shape: tuple[int, ...] = ()

    @property
    def outputs(self) -> int:
        """Number of outputs of all consumers together."""
        return sum(consumer.outputs for consumer in self.consumers)

    @property
    def metric(self) -> Tensor:
        """The metric (O, O) with `loss = tr(metric Cov(error))`, regularised a little in every direction.

        Without any gradient: the identity, per row.
        """
        if not self.samples or not bool(self.sensitivity.diagonal().sum() > 0):
            return torch.eye(self.outputs, dtype=torch.float64, device=self.sensitivity.device)
        found = self.sensitivity / self.samples
        return found + torch.eye(len(found), dtype=found.dtype, device=found.device) * found.diagonal().mean() * 1e-3

    def state(self) -> dict[str, Any]:
        """The sums, as plain values and tensors. `restore` reads them back."""
        plain = {"inputs": self.inputs, "samples": self.samples, "seen": self.seen, "shape": tuple(self.shape)}
        return {**plain, "rows": self.rows.state(), "sensitivity": self.sensitivity}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Restore the result of `state`."""
        self.rows = Covariance.of(state["rows"], self.rows.mean.device)
        self.sensitivity = state["sensitivity"].to(self.sensitivity)
        self.inputs, self.samples, self.seen = state["inputs"], state["samples"], state["seen"]
        self.shape = state["shape"]

    def merge(self, other: Observation) -> None:
        """Add the sums of another one, from other batches."""
        if other.inputs != self.inputs:
            self.without_skip()
            other = replace(other)
            other.without_skip()
        self.rows.merge(other.rows)
        self.sensitivity = self.sensitivity + other.sensitivity.to(self.sensitivity)
        self.samples += other.samples
        self.seen += other.seen
        self.shape = self.shape or other.shape

    def without_skip(self) -> None:
        """Continue with the hidden channels alone."""
        self.rows, self.inputs = self.rows.part(self.inputs), 0

    def weight(self, model: nn.Module) -> Tensor:
        """The stacked weights of the consumers, (O, C * g), float64."""
        return torch.cat([columns_of(model, consumer) for consumer in self.consumers])

    def bias(self, model: nn.Module) -> Tensor:
        """The consumers' biases, (O,), float64."""
        return torch.cat([bias_of(model, consumer.port, consumer.outputs) for consumer in self.consumers])
