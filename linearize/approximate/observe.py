"""One pass over data: the covariance of what each site reads and holds, and what an error in its output costs.

For each site the rows are (x, h): the site's input and its hidden channels as the consumers read them, padding left
out. Beside them comes the sensitivity of the model's output to an error in the site's: the Gauss-Newton matrix
`G = E[g g^T]`, with g the gradient, at a row of the site's output, of a random projection of the model's output.
Errors of rows are taken as independent of each other, and of the gradient (as in K-FAC, Martens and Grosse, ICML 2015).

Shape letters: B samples, T positions, R rows, I inputs, C channels, g features per channel, O outputs.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from linearize.approximate.covariance import Covariance, in_passes
from linearize.approximate.editable import (
    Consumer,
    bias_of,
    columns_of,
    consumers_of,
    obstacle_to_refit,
)
from linearize.approximate.probes import projection
from linearize.approximate.rows import batched, gradient_rows, patches_of, positions_for, row_weights, rows_of
from linearize.approximate.skip import Source, skip_source
from linearize.calibrate import padding_mask
from linearize.errors import DataError
from linearize.gate import gates
from linearize.running.batches import length_of, read_batches
from linearize.running.models import device_of, watching
from linearize.running.progress import progress_bar
from linearize.sites import Site

__all__ = ["Observation", "observe"]


@dataclass
class Observation:
    """What a pass found at a site.

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
        """Outputs of all consumers together."""
        return sum(consumer.outputs for consumer in self.consumers)

    @property
    def metric(self) -> Tensor:
        """What an error in the output costs: `loss = tr(metric Cov(error))`, (O, O); a little in every direction.

        Without any gradient: the identity, per row.
        """
        if not self.samples or not bool(self.sensitivity.diagonal().sum() > 0):
            return torch.eye(self.outputs, dtype=torch.float64, device=self.sensitivity.device)
        found = self.sensitivity / self.samples
        return found + torch.eye(len(found), dtype=found.dtype, device=found.device) * found.diagonal().mean() * 1e-3

    def state(self) -> dict[str, Any]:
        """What the pass found, as plain values and tensors: `observe` takes it as `known`."""
        plain = {"inputs": self.inputs, "samples": self.samples, "seen": self.seen, "shape": tuple(self.shape)}
        return {**plain, "rows": self.rows.state(), "sensitivity": self.sensitivity}

    def weight(self, model: nn.Module) -> Tensor:
        """The consumers' weights under one another, (O, C * g), float64."""
        return torch.cat([columns_of(model, consumer) for consumer in self.consumers])

    def bias(self, model: nn.Module) -> Tensor:
        """The consumers' biases, (O,), float64."""
        return torch.cat([bias_of(model, consumer.port, consumer.outputs) for consumer in self.consumers])


@dataclass
class _Watch:
    """What one site shows during one batch; its skip would start at `start`."""

    found: Observation
    start: Source | None
    x: Tensor | None = None
    h: Tensor | None = None
    gradients: dict[int, Tensor] = field(default_factory=dict)

    def take(self, mask: Tensor | None, generator: torch.Generator) -> None:
        """Turn the batch into rows, and forget it."""
        if self.h is None:
            return
        found, consumer = self.found, self.found.consumers[0]
        gradient = gradient_rows(found.consumers, self.gradients, mask)
        if consumer.spatial:
            h, where, positions = patches_of(self.h, consumer.module, self._wanted, generator)
            weights = None
        else:
            h, weights = rows_of(self.h, consumer.port.dims, mask), row_weights(gradient)
        if found.inputs and self.x is not None:
            x = self._at(where, positions) if consumer.spatial else rows_of(self.x, consumer.port.dims, mask)
            x = x.to(h)
            if len(x) != len(h):  # a pooling lies between: the consumer has rows of its own, and no skip is possible
                found.inputs, found.rows = 0, Covariance(h.shape[1], found.rows.mean.device)
            else:
                h = torch.cat((x, h), 1)
        if weights is not None and len(weights) != len(h):
            weights = None
        found.rows.update(h, weights)
        if gradient is not None:
            g = gradient.to(found.sensitivity)
            found.sensitivity.addmm_(g.t(), g)
        self.x = self.h = None
        self.gradients.clear()

    @property
    def _wanted(self) -> int:
        return positions_for(self.found.rows.count, len(self.found.rows.mean))

    def _at(self, where: Tensor, positions: int) -> Tensor:
        """Rows of the site's input at some positions (R, I); none if it has another number of them."""
        if self.x is None or math.prod(self.x.shape[2:]) != positions:
            return where.new_zeros(0, 1)
        return self.x.flatten(2)[:, :, where].transpose(1, 2).flatten(0, 1)


def observe(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    sites: Iterable[str] | None = None,
    sensitivity: bool = True,
    seed: int = 0,
    memory: float = 2e9,
    progress: bool = True,
    known: Mapping[str, Any] | None = None,
    finished: Callable[[dict[str, Observation]], None] = lambda _: None,
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
        known: by site name, the `state` of observations that have been made already.
        finished: is given what each pass found.

    Returns:
        By site name, in order of execution. A site that no batch reached has `rows.count` 0.

    Raises:
        DataError: there are no batches, or NaN or infinity turned up at a site.

    Example:
        >>> import linearize
        >>> net = linearize.convert(nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(4, 3))
        >>> found = observe(net, [torch.randn(64, 3)], progress=False)["1"]
        >>> found.rows.count, found.rows.covariance.shape
        (64, torch.Size([11, 11]))
    """
    named = gates(model)
    wanted = [name for name in named if (sites is None or name in set(sites))]
    able = [name for name in wanted if obstacle_to_refit(model, named[name].site) is None]
    known = known or {}
    result = {name: _restored(model, named[name].site, known[name]) for name in able if name in known}
    for some in _in_memory(model, [name for name in able if name not in known], memory):
        found = {name: _empty(model, named[name].site) for name in some}
        _pass(model, batches, found, sensitivity, seed, progress)
        finished(found)
        result.update(found)
    return {name: result[name] for name in able}


def _restored(model: nn.Module, site: Site | None, state: Mapping[str, Any]) -> Observation:
    """The observation whose state was kept."""
    found = _empty(model, site)
    rows = Covariance.of(state["rows"], found.rows.mean.device)
    sensitivity = state["sensitivity"].to(found.sensitivity)
    plain = {name: state[name] for name in ("inputs", "samples", "seen", "shape")}
    return replace(found, rows=rows, sensitivity=sensitivity, **plain)


def _empty(model: nn.Module, site: Site | None) -> Observation:
    if site is None:
        raise DataError("observe", "found a gate without a site", "Put gates in with linearize.convert.")
    consumers = consumers_of(model, site)
    source = skip_source(model, site)
    inputs = source.inputs if source is not None else 0
    device = device_of(model)
    place = torch.device("cpu") if device.type == "mps" else device
    outputs = sum(consumer.outputs for consumer in consumers)
    rows = Covariance(inputs + site.channels * consumers[0].group, place)
    return Observation(
        site, inputs, consumers[0].group, consumers, rows, torch.zeros(outputs, outputs, dtype=torch.float64).to(place)
    )


def _in_memory(model: nn.Module, names: list[str], memory: float) -> Iterator[list[str]]:
    """Groups of sites whose covariances fit the memory together; one site at least."""
    named = gates(model)

    def features(name: str) -> list[int]:
        site = named[name].site
        if site is None:
            return []
        source = skip_source(model, site)
        return [site.channels * consumers_of(model, site)[0].group + (source.inputs if source is not None else 0)]

    return in_passes([name for name in names if named[name].site is not None], features, memory)


def _pass(
    model: nn.Module,
    batches: Iterable[Any],
    found: dict[str, Observation],
    sensitivity: bool,
    seed: int,
    progress: bool,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    watches = {name: _Watch(seen, skip_source(model, seen.site)) for name, seen in found.items()}
    count = 0
    hooks = functools.partial(_hooks, model, watches)
    attach = hooks if sensitivity else lambda _: hooks(None)
    bar = progress_bar("observe", length_of(batches), enabled=progress)
    with watching(model, attach, gradients=sensitivity) as handle, bar as advance:
        for index, batch in enumerate(read_batches(model, batches)):
            output = batch.run(model)
            if sensitivity:
                scalar, positions = projection(output, batch, generator)
                if scalar.requires_grad:
                    torch.autograd.grad(scalar, handle, allow_unused=True)
                for observation in found.values():
                    observation.samples += positions
            for name, watch in watches.items():
                watch.take(padding_mask(model, name, batch.masks), generator)
                if not watch.found.rows.finite:
                    remedy = "Check this batch, and the weights before this site."
                    raise DataError(name, f"found NaN or infinity at this activation in batch {index}", remedy)
                watch.found.seen += batch.size
            count += 1
            advance("")
    if not count:
        raise DataError("data", "found no batches", "Pass at least one (a generator is empty after its first use).")


def _hooks(model: nn.Module, watches: dict[str, _Watch], source: Tensor | None) -> Iterator[Any]:
    """Hooks on producers and consumers."""
    for watch in watches.values():
        for index, consumer in enumerate(watch.found.consumers):
            module = model.get_submodule(consumer.port.module)
            yield module.register_forward_hook(_see_output(watch, index, source))
        producer = watch.found.site.producer
        if producer is not None:
            yield model.get_submodule(producer.module).register_forward_pre_hook(_see_input(watch))


def _see_input(watch: _Watch) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    def see(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        start = watch.start if watch.found.inputs else None
        producer = watch.found.site.producer
        x = batched(inputs[0].detach(), producer.dims if producer is not None else 0)
        watch.x = None if start is None else start.at_outputs(x)
        watch.found.shape = watch.found.shape or tuple(x.shape)

    return see


def _see_output(watch: _Watch, index: int, source: Tensor | None) -> Callable[[nn.Module, Any, Tensor], Tensor | None]:
    def see(_: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor | None:
        if index == 0:
            consumer = watch.found.consumers[0]
            watch.h = batched(consumer.reads(inputs[0].detach()), consumer.port.dims)
        if source is None or not output.is_floating_point():
            return None
        output = output + source.to(output.dtype)
        if not output.requires_grad:  # the model's own code switches gradients off
            return None

        def keep(gradient: Tensor) -> None:
            watch.gradients[index] = gradient.detach()

        output.register_hook(keep)
        return output

    return see
