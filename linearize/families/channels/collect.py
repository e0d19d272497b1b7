"""Statistics of sites: the covariance of inputs and hidden channels, and the sensitivity to an error in the output.

For each site, the rows are (x, h): the site's input, and its hidden channels as the consumers read them. Padding is
left out. The sensitivity is the Gauss-Newton matrix `G = E[g g^T]`, where g is the gradient of a random projection of
the model's output, at a row of the site's output. Errors of different rows are taken as independent of each other, and
of the gradient (as in K-FAC, Martens and Grosse, ICML 2015).

Shape letters: B samples, T positions, R rows, I inputs, C channels, g features per channel, O outputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from linearize.algebra.covariance import Covariance
from linearize.families.channels.editable import (
    consumers_of,
    obstacle_to_refit,
)
from linearize.families.channels.observation import Observation
from linearize.families.channels.skip import SkipSource, skip_source
from linearize.gating.gate import gates
from linearize.running.models import device_of
from linearize.running.passes import Moment, StatisticsStore, run_passes
from linearize.running.rows import Wanted, batched, gradient_rows, patches_of, row_weights, rows_of
from linearize.sites.site import Site
from linearize.training.probes import projection

__all__ = ["SiteCollector", "observe", "site_collectors"]


@dataclass
class SiteCollector:
    """Collects the statistics of one site. A skip would start at `start`.

    Attributes:
        found: the sums.
        start: where a skip would begin; None where none is possible.
        gradients: whether the sensitivity of the output is wanted.
    """

    found: Observation
    start: SkipSource | None
    gradients: bool = True
    kind: str = field(default="site", init=False)
    _x: Tensor | None = field(default=None, init=False)
    _h: Tensor | None = field(default=None, init=False)
    _gradients: dict[int, Tensor] = field(default_factory=dict, init=False)

    @property
    def name(self) -> str:
        """The name of the site."""
        return self.found.site.name

    @property
    def memory(self) -> float:
        """Bytes that the sums take."""
        return 8.0 * len(self.found.rows.mean) ** 2

    def attach(self, now: Moment) -> Iterator[Any]:
        """Watch the producer's input, and the consumers' inputs and outputs."""
        for index, consumer in enumerate(self.found.consumers):
            module = now.model.get_submodule(consumer.port.module)
            yield module.register_forward_hook(self._see_output(index, now))
        producer = self.found.site.producer
        if producer is not None:
            yield now.model.get_submodule(producer.module).register_forward_pre_hook(self._see_input)

    def _see_input(self, _: nn.Module, inputs: tuple[Any, ...]) -> None:
        start, producer = self.start if self.found.inputs else None, self.found.site.producer
        x = batched(inputs[0].detach(), producer.dims if producer is not None else 0)
        self._x = None if start is None else start.at_outputs(x)
        self.found.shape = self.found.shape or tuple(x.shape)

    def _see_output(self, index: int, now: Moment) -> Callable[[nn.Module, Any, Tensor], Tensor | None]:
        def see(_: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor | None:
            if index == 0:
                consumer = self.found.consumers[0]
                self._h = batched(consumer.reads(inputs[0].detach()), consumer.port.dims)
            if not self.gradients or not output.is_floating_point():
                return None
            output = output + now.source.to(output.dtype)
            if not output.requires_grad:  # the model's own code switches gradients off
                return None

            def keep(gradient: Tensor) -> None:
                self._gradients[index] = gradient.detach()

            output.register_hook(keep)
            return output

        return see

    @torch.no_grad()
    def take(self, now: Moment) -> None:
        """Turn the batch into rows, add them to the sums, and release the batch."""
        found, consumer = self.found, self.found.consumers[0]
        found.seen += now.batch.size
        if self.gradients:
            found.samples += now.positions
        if self._h is None:
            return
        mask = now.mask(self.name)
        gradient = gradient_rows([c.port.dims for c in found.consumers], self._gradients, mask)
        if consumer.spatial:
            wanted = Wanted(now.index, len(found.rows.mean))
            h, where, positions = patches_of(self._h, consumer.module, wanted, now.generator(self.name))
            weights = None
        else:
            h, weights = rows_of(self._h, consumer.port.dims, mask), row_weights(gradient)
        if found.inputs and self._x is not None:
            x = self._at(where, positions) if consumer.spatial else rows_of(self._x, consumer.port.dims, mask)
            if len(x) != len(h):  # a pooling lies between: the consumer has rows of its own, and no skip is possible
                found.without_skip()
            else:
                h = torch.cat((x.to(h), h), 1)
        if weights is not None and len(weights) != len(h):
            weights = None
        found.rows.update(h, weights)
        if gradient is not None:
            g = gradient.to(found.sensitivity)
            found.sensitivity.addmm_(g.t(), g)
        self._x = self._h = None
        self._gradients.clear()

    def _at(self, where: Tensor, positions: int) -> Tensor:
        """Rows of the site's input at some positions (R, I); none if it has another number of them."""
        if self._x is None or math.prod(self._x.shape[2:]) != positions:
            return where.new_zeros(0, 1)
        return self._x.flatten(2)[:, :, where].transpose(1, 2).flatten(0, 1)

    @property
    def finite(self) -> bool:
        """Whether all sums are finite."""
        return self.found.rows.finite

    def merge(self, other: SiteCollector) -> None:
        """Add the sums of another collector, from other batches."""
        self.found.merge(other.found)

    def state(self) -> dict[str, Any]:
        """The sums, as plain values and tensors."""
        return self.found.state()

    def restore(self, state: Mapping[str, Any]) -> None:
        """Restore the result of `state`."""
        self.found.restore(state)


def site_collectors(
    model: nn.Module, sites: Iterable[str] | None = None, *, sensitivity: bool = True, skips: bool = True
) -> list[SiteCollector]:
    """A collector for every site that can be refitted, in order of execution.

    Args:
        model: with gates.
        sites: names of those to observe; None takes all that can be refitted.
        sensitivity: also the sensitivity of the output, for which passes run backwards.
        skips: also the inputs, for linear skips.
    """
    wanted = None if sites is None else set(sites)
    found = []
    for name, gate in gates(model).items():
        if gate.site is None or (wanted is not None and name not in wanted):
            continue
        if obstacle_to_refit(model, gate.site) is None:
            start = skip_source(model, gate.site) if skips else None
            found.append(SiteCollector(_empty(model, gate.site, start), start, sensitivity))
    return found


def observe(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    sites: Iterable[str] | None = None,
    sensitivity: bool = True,
    seed: int = 0,
    memory: float = 2e9,
    progress: bool = True,
    store: StatisticsStore | None = None,
) -> dict[str, Observation]:
    """Stream data through a gated model, and gather the statistics of every site that can be refitted.

    Args:
        model: with gates; it runs in eval mode and is left as it was.
        batches: as for `linearize.calibrate`, re-iterable.
        sites: names of those to observe; None takes all that can be refitted.
        sensitivity: also run backwards, for the sensitivity of the output.
        seed: of random projections and of sampled positions.
        memory: bytes for covariances at a time; sites beyond that wait for another pass over the data.
        progress: show a bar on a terminal.
        store: of an interrupted run.

    Returns:
        By site name, in order of execution. A site that no batch reached has `rows.count` 0.

    Raises:
        DataError: there are no batches, or NaN or infinity turned up at a site.

    Examples:
        >>> import linearize
        >>> net = linearize.convert(nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(4, 3))
        >>> found = observe(net, [torch.randn(64, 3)], progress=False)["1"]
        >>> found.rows.count, found.rows.covariance.shape
        (64, torch.Size([11, 11]))
    """
    collectors = site_collectors(model, sites, sensitivity=sensitivity)
    run_passes(model, batches, collectors, probe=projection, seed=seed, memory=memory, progress=progress, store=store)
    return {collector.name: collector.found for collector in collectors}


def _empty(model: nn.Module, site: Site, source: SkipSource | None) -> Observation:
    consumers = consumers_of(model, site)
    inputs = source.inputs if source is not None else 0
    device = device_of(model)
    place = torch.device("cpu") if device.type == "mps" else device
    outputs = sum(consumer.outputs for consumer in consumers)
    rows = Covariance(inputs + site.channels * consumers[0].group, place)
    return Observation(
        site, inputs, consumers[0].group, consumers, rows, torch.zeros(outputs, outputs, dtype=torch.float64).to(place)
    )
