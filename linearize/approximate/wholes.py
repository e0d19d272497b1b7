"""Whole modules as one linear map: attention, a residual block, whatever makes one tensor of one, of its shape.

A residual block often does little to its input. Its least-squares matrix, applied at every position, then stands for
all of it: attention, norms and depthwise maps included, where no activation could be collapsed. This is approximate;
what it loses is predicted like every other option.

Source of the idea: Shopkhoev et al., "ReplaceMe: Network Simplification via Depth Pruning and Transformer Block
Linearization", 2025.

Shape letters: I inputs and O outputs of the module, R rows (positions).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from linearize.approximate.covariance import Covariance, in_passes
from linearize.approximate.probes import projection
from linearize.approximate.removal import regularised
from linearize.approximate.rows import positions_for, rows_of
from linearize.calibrate import padding_mask
from linearize.gate import ChannelGate
from linearize.record import Record, Step, record_of, set_record
from linearize.running.batches import read_batches
from linearize.running.models import watching
from linearize.surgery.carriers import roles_of
from linearize.surgery.specs import Spec, build, replace_module

__all__ = ["Whole", "WholeFit", "layer_of", "observe_wholes", "replace_wholes"]


@dataclass
class Whole:
    """A module that one linear map could stand for, and what a pass over data found about it.

    Attributes:
        path: of the module.
        sites: names of the gated sites inside.
        inside: path of the smallest other whole module around it; "" for none.
        inputs, outputs: I and O.
        axis: of the channels, counted from the end.
        alone: True if the module is called with one argument only, and gives nothing but a tensor.
        flops, params: of the module, for the example batch.
        shape: of the input in the example batch.
        behind: path of the module whose output is its input, and goes nowhere else; "" if none is known.
        keyword: by which it is given its input; "" if by position.
        nones: how many None it gives behind its output.
        rows: covariance of (input, output).
        sensitivity: G of the output, (O, O).
        samples: what the sensitivity is a sum over.
    """

    path: str
    sites: tuple[str, ...]
    inside: str
    inputs: int
    outputs: int
    axis: int
    alone: bool
    flops: float
    params: float
    shape: tuple[int, ...]
    behind: str = ""
    keyword: str = ""
    nones: int = 0
    rows: Covariance | None = None
    sensitivity: Tensor | None = None
    samples: float = 0.0

    def state(self) -> dict[str, Any]:
        """What the pass found, as plain values and tensors; `restore` takes it back."""
        rows = None if self.rows is None else self.rows.state()
        return {"samples": self.samples, "rows": rows, "sensitivity": self.sensitivity}

    def restore(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Take what `state` gave."""
        self.rows = None if state["rows"] is None else Covariance.of(state["rows"], device)
        sensitivity: Tensor | None = state["sensitivity"]
        self.sensitivity = None if sensitivity is None else sensitivity.to(device)
        self.samples = state["samples"]

    @property
    def spec(self) -> Spec:
        """The layer that would stand for the module."""
        kind, more = ("", {}) if self.alone else ("Only", {"keyword": self.keyword, "nones": self.nones})
        if self.axis == -1:
            sizes = {"in_features": self.inputs, "out_features": self.outputs}
            return {"type": f"{kind}Linear", **sizes, "bias": True, **more}
        n = -1 - self.axis
        channels = {"in_channels": self.inputs, "out_channels": self.outputs, "kernel_size": [1] * n}
        rest = {"stride": [1] * n, "padding": [0] * n, "dilation": [1] * n, "groups": 1, "bias": True}
        return {"type": f"{kind}Conv{n}d", **channels, **rest, **more}

    @property
    def least(self) -> float:
        """FLOPs of that layer, for the example batch."""
        return 2.0 * math.prod(self.shape) * self.outputs

    def fit(self, ridge: float = 1e-3) -> WholeFit | None:
        """Least squares; of the change, where input and output have equal widths, so that the ridge draws to none.

        None if no batch reached the module, or something that is no number.
        """
        if self.rows is None or not self.rows.count or not bool(self.rows.scatter.isfinite().all()):
            return None
        inputs, covariance, mean = self.inputs, self.rows.covariance, self.rows.mean
        ridge = ridge if self.rows.count > inputs else 0.1 * inputs / self.rows.count
        kind: dict[str, Any] = {"dtype": mean.dtype, "device": mean.device}
        same = torch.eye(self.outputs, inputs, **kind) * float(inputs == self.outputs)
        change = covariance[:inputs, inputs:] - covariance[:inputs, :inputs] @ same.t()
        factor = torch.linalg.cholesky(regularised(covariance[:inputs, :inputs], ridge))
        weight = torch.cholesky_solve(change, factor).t() + same
        bias = mean[inputs:] - weight @ mean[:inputs]
        error = torch.cat((-weight, torch.eye(self.outputs, **kind)), 1)
        left = error @ covariance @ error.t()
        metric = torch.eye(self.outputs, **kind)
        if self.sensitivity is not None and self.samples:
            metric = self.sensitivity / self.samples
        return WholeFit(weight, bias, float((metric * left).sum()))


@dataclass(frozen=True)
class WholeFit:
    """Weight (O, I) and bias (O,) of a linear map, float64, and the predicted loss."""

    weight: Tensor
    bias: Tensor
    loss: float


def observe_wholes(
    model: nn.Module,
    batches: Iterable[Any],
    wholes: Sequence[Whole],
    *,
    seed: int = 0,
    memory: float = 2e9,
    finished: Callable[[Sequence[Whole]], None] = lambda _: None,
) -> None:
    """Fill in what data tells about whole modules, as many in a pass as fit into memory; `finished` is given those."""
    for group in in_passes(wholes, lambda whole: [whole.inputs + whole.outputs, whole.outputs], memory):
        _observe(model, batches, group, seed)
        finished(group)


def _observe(model: nn.Module, batches: Iterable[Any], wholes: Sequence[Whole], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    watches = [_Watch(whole, generator) for whole in wholes]
    with watching(model, lambda source: _hooks(model, watches, source)) as source:
        for batch in read_batches(model, batches):
            for watch in watches:
                watch.mask = padding_mask(model, watch.whole.path, batch.masks)
            scalar, positions = projection(batch.run(model), batch, generator)
            if scalar.requires_grad:
                torch.autograd.grad(scalar, source, allow_unused=True)
            for watch in watches:
                watch.whole.samples += positions
                watch.seen = None


def _hooks(model: nn.Module, watches: Sequence[_Watch], source: Tensor) -> Iterator[Any]:
    for watch in watches:
        module = model.get_submodule(watch.whole.path)
        yield module.register_forward_pre_hook(watch.begin, with_kwargs=True)
        yield module.register_forward_hook(watch.end(source))


@dataclass
class _Watch:
    """Takes rows of a module's input and output as they pass: what comes later may overwrite them."""

    whole: Whole
    generator: torch.Generator
    mask: Tensor | None = None
    seen: tuple[Tensor, Tensor] | None = None

    @torch.no_grad()
    def begin(self, _: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        given = args[0] if args else kwargs[self.whole.keyword]
        rows = self._rows(given.detach())
        known = 0 if self.whole.rows is None else self.whole.rows.count
        count = positions_for(known, self.whole.inputs) * len(given)
        chosen = torch.randperm(len(rows), generator=self.generator)[:count].to(rows.device)
        self.seen = rows[chosen].clone(), chosen

    def end(self, source: Tensor) -> Callable[[nn.Module, Any, Any], Any]:
        def see(_: nn.Module, __: Any, given: Any) -> Any:
            output = given[0] if self.whole.nones else given
            self._take(output.detach())
            output = output + source.to(output.dtype)
            if output.requires_grad:
                output.register_hook(self._weigh)
            return (output, *given[1:]) if self.whole.nones else output

        return see

    @torch.no_grad()
    def _take(self, output: Tensor) -> None:
        if self.seen is None:
            return
        inputs, chosen = self.seen
        rows = torch.cat((inputs, self._rows(output)[chosen]), 1)
        self.whole.rows = self.whole.rows or Covariance(rows.shape[1], rows.device)
        self.whole.rows.update(rows)

    @torch.no_grad()
    def _weigh(self, gradient: Tensor) -> None:
        if self.whole.rows is None:
            return
        g = self._rows(gradient).to(self.whole.rows.mean)  # float64, which not every device has
        total = g.t() @ g
        self.whole.sensitivity = total if self.whole.sensitivity is None else self.whole.sensitivity + total

    def _rows(self, x: Tensor) -> Tensor:
        return rows_of(x, -1 - self.whole.axis, self.mask)


@torch.no_grad()
def layer_of(model: nn.Module, whole: Whole, found: WholeFit) -> nn.Module:
    """The layer that would stand for a module of a model, in its dtype and on its device."""
    old = model.get_submodule(whole.path)
    like = next(parameter for parameter in old.parameters() if parameter.is_floating_point())
    layer = build(whole.spec, old).to(like.device, like.dtype)
    values = {"weight": found.weight, "bias": found.bias}
    for role, (holder, name) in roles_of(layer).items():
        parameter = holder.get_parameter(name)
        parameter.copy_(values[role].view_as(parameter))
    layer.requires_grad_(_trained(old))
    return layer


def _trained(module: nn.Module) -> bool:
    """Whether anything in a module is trained, its gates apart: adapters may be, beside weights that are not."""
    alphas = {id(gate.alpha) for gate in module.modules() if isinstance(gate, ChannelGate)}
    return any(parameter.requires_grad for parameter in module.parameters() if id(parameter) not in alphas)


def replace_wholes(model: nn.Module, chosen: Sequence[tuple[Whole, WholeFit]]) -> None:
    """Put linear maps in the place of modules of a gated model; sites inside have no gates any more.

    Maps of which one does nothing but read the other become one.
    """
    steps: list[Step] = []
    why: dict[str, str] = {}
    for whole, found in _merged(chosen):
        for gate in model.get_submodule(whole.path).modules():
            if isinstance(gate, ChannelGate) and gate.site is not None:
                why[gate.site.name] = f"{whole.path} became one linear map"
        spec: Spec = {"type": "Identity"} if found is None else whole.spec
        layer = build(spec, nn.Identity()) if found is None else layer_of(model, whole, found)
        replace_module(model, whole.path, layer)
        steps.append({"path": whole.path, "module": spec})
    record = record_of(model) or Record()
    sites = tuple(replace(site, ungated=why.get(site.name, site.ungated)) for site in record.sites)
    set_record(model, Record(sites, [*record.steps, *steps], record.inputs))


def _merged(chosen: Sequence[tuple[Whole, WholeFit]]) -> list[tuple[Whole, WholeFit | None]]:
    """The same maps, those that follow each other multiplied where that costs no more; None for what is left over."""
    found: dict[str, tuple[Whole, WholeFit | None]] = {}
    heads: dict[str, str] = {}  # by path of a map, the path of the one that it went into
    for whole, fit in chosen:
        head = heads.get(whole.behind, "")
        first, known = found.get(head, (None, None))
        if first is None or known is None or not (first.alone and whole.alone) or first.axis != whole.axis:
            found[whole.path], heads[whole.path] = (whole, fit), whole.path
            continue
        if whole.outputs * first.inputs > first.outputs * (first.inputs + whole.outputs):
            found[whole.path], heads[whole.path] = (whole, fit), whole.path
            continue
        both = WholeFit(fit.weight @ known.weight, fit.weight @ known.bias + fit.bias, known.loss + fit.loss)
        found[head] = replace(first, outputs=whole.outputs), both
        found[whole.path], heads[whole.path] = (whole, None), head
    return list(found.values())
