"""Whole blocks as one convolution: expand, depthwise, project, with both activations, become a dense k x k kernel.

On most hardware one dense convolution outruns a chain of thin ones of fewer FLOPs (Fu et al., "DepthShrinker", ICML
2022). The kernel is that of least squares from the patches of the block's input to the output that the block gives on
data; it may be smaller than the block's own. This is approximate; what it loses is predicted like every other option.
Zero padding inside a block makes its bias another near the border; a channel of ones, padded like the rest, learns it.

Shape letters: I inputs and O outputs of the block, k kernel, R rows (positions).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from linearize.algebra.affine import pad_same
from linearize.algebra.forms import Infeasible
from linearize.approximate.covariance import Covariance, in_passes
from linearize.approximate.probes import projection
from linearize.approximate.removal import regularised
from linearize.approximate.rows import batched, positions_for
from linearize.gate import gates
from linearize.record import Record, Step, record_of, set_record
from linearize.running.batches import read_batches
from linearize.running.models import watching
from linearize.sites import Port, Site
from linearize.surgery.carriers import roles_of
from linearize.surgery.specs import Spec, build, replace_module
from linearize.tensors import meddler

__all__ = ["Block", "BlockFit", "blocks_of", "observe_blocks", "replace_block"]

_WIDEST = 4000  # features of a patch


@dataclass
class Block:
    """A chain of sites between two maps, and what a pass over data found about it.

    Attributes:
        sites: of the chain, in order.
        first, last: the map that the block begins with, and the one it ends with.
        maps: paths of all its maps, in order.
        kernel, stride: of the dense convolution with the block's own reach.
        same: padding by the "SAME" rule.
        rows: covariance of (patches, output), by kernel size.
        sensitivity: G of the output, (O, O).
        shape: of the block's input in the first batch.
        positions: of the output, in the example batch.
    """

    sites: tuple[Site, ...]
    first: Port
    last: Port
    maps: tuple[str, ...]
    inputs: int
    outputs: int
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    same: bool
    rows: dict[int, Covariance] = field(default_factory=dict)
    sensitivity: Tensor | None = None
    samples: float = 0.0
    shape: tuple[int, ...] = ()

    def state(self) -> dict[str, Any]:
        """What the pass found, as plain values and tensors; `restore` takes it back."""
        rows = {kernel: rows.state() for kernel, rows in self.rows.items()}
        plain = {"samples": self.samples, "shape": tuple(self.shape)}
        return {**plain, "rows": rows, "sensitivity": self.sensitivity}

    def restore(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Take what `state` gave."""
        self.rows = {kernel: Covariance.of(rows, device) for kernel, rows in state["rows"].items()}
        sensitivity: Tensor | None = state["sensitivity"]
        self.sensitivity = None if sensitivity is None else sensitivity.to(device)
        self.samples, self.shape = state["samples"], state["shape"]

    @property
    def name(self) -> str:
        """Of its first site."""
        return self.sites[0].name

    @property
    def kernels(self) -> list[int]:
        """Sizes to try: its own, and a smaller one."""
        own = max(self.kernel)
        return [k for k in dict.fromkeys((own, 3)) if k <= own and k * k * self.inputs <= _WIDEST]

    def spec(self, kernel: int, *, bordered: bool = False) -> Spec:
        """The layer that would stand for the block."""
        padding = [0, 0] if self.same else [kernel // 2] * 2
        sizes = {"in_channels": self.inputs, "out_channels": self.outputs, "kernel_size": [kernel] * 2}
        rest = {"stride": list(self.stride), "padding": padding, "dilation": [1, 1], "groups": 1, "bias": True}
        kind = ("Border" if bordered else "") + ("SameConv2d" if self.same else "Conv2d")
        return {"type": kind, **sizes, **rest}

    def flops(self, kernel: int, *, bordered: bool = False) -> float:
        """Of that layer, for the example batch; a border is computed once for all of it."""
        images = max(1, self.shape[0]) if self.shape else 1
        inputs = self.inputs + (1 / images if bordered else 0)
        return 2.0 * self.last.positions * inputs * self.outputs * kernel**2

    def fit(self, kernel: int, ridge: float = 1e-3, *, bordered: bool = False) -> BlockFit:
        """The best kernel of a size, with a border's (of a channel of ones) or without."""
        found = self.rows[kernel]
        features = (self.inputs + bordered) * kernel**2
        last = torch.arange(len(found.mean), device=found.mean.device)[-self.outputs :]
        used = torch.cat((torch.arange(features, device=last.device), last))
        covariance, mean = found.covariance[used][:, used], found.mean[used]
        ridge = ridge if found.count > features else 0.1 * features / max(1, found.count)
        factor = torch.linalg.cholesky(regularised(covariance[:features, :features], ridge))
        weight = torch.cholesky_solve(covariance[:features, features:], factor).t()
        bias = mean[features:] - weight @ mean[:features]
        error = torch.cat((-weight, torch.eye(self.outputs, dtype=weight.dtype, device=weight.device)), 1)
        left = error @ covariance @ error.t()
        metric = torch.eye(self.outputs, dtype=weight.dtype, device=weight.device)
        if self.sensitivity is not None and self.samples:
            metric = self.sensitivity / self.samples
        kernels = weight.view(self.outputs, -1, kernel, kernel)
        border = kernels[:, self.inputs :] if bordered else None
        return BlockFit(kernels[:, : self.inputs], bias, float((metric * left).sum()), border)


@dataclass(frozen=True)
class BlockFit:
    """Weight (O, I, k, k), bias (O,) and border (O, 1, k, k) of a convolution, float64, and the predicted loss."""

    weight: Tensor
    bias: Tensor
    loss: float
    border: Tensor | None = None


def blocks_of(model: nn.Module, groups: Sequence[Sequence[str]]) -> list[Block]:
    """The groups of sites that one convolution could stand for: a chain of plain maps, one of them spatial at least."""
    found = []
    for names in groups:
        named = gates(model)
        sites = [named[name].site for name in names]
        try:
            block = _block(model, [site for site in sites if site is not None])
        except Infeasible:
            continue
        if block.kernels:
            found.append(block)
    return found


def _block(model: nn.Module, sites: list[Site]) -> Block:
    ports: list[Port] = []
    for site in sites:
        if site.reason is not None or site.producer is None or site.up is not None or len(site.consumers) != 1:
            raise Infeasible("no chain of plain maps")
        if site.parts > 1 or site.bent or not site.consumers[0].whole:
            raise Infeasible("a concatenation, channels that are taken apart, or a maximum")
        if not ports:
            ports.append(site.producer)
        if site.producer.module != ports[-1].module:
            raise Infeasible("its sites do not follow each other")
        ports.append(site.consumers[0])
    if not ports or len({port.module for port in ports}) != len(ports):
        raise Infeasible("a map comes twice")
    modules: list[Any] = [model.get_submodule(port.module) for port in ports]
    for port, module in zip(ports, modules, strict=True):
        if port.dims != 2 or not isinstance(module, nn.Conv2d) or set(module.dilation) != {1}:
            raise Infeasible("not convolutions of two dimensions")
        if module.padding_mode != "zeros":
            raise Infeasible("padding of another kind")
    inside = [port.module for port in ports]
    inside += [part for site in sites for part in (site.name, *(f.module for f in (*site.folds, *site.consumer_folds)))]
    for path in inside:
        if any(meddler(part) for part in model.get_submodule(path).modules()):
            raise Infeasible(f"{path} has a hook, or a forward put on it")
    kernel = tuple(max(int(m.kernel_size[axis]) for m in modules) for axis in range(2))
    if max(kernel) == 1 or kernel[0] != kernel[1]:
        raise Infeasible("pointwise throughout, or not square")
    stride = tuple(math.prod(int(m.stride[axis]) for m in modules) for axis in range(2))
    spatial = [m for m in modules if max(m.kernel_size) > 1]
    same = any(type(m).forward is not nn.Conv2d.forward for m in spatial)
    if not same and any(m.padding != (m.kernel_size[0] // 2,) * 2 for m in spatial):
        raise Infeasible("padding that does not keep the size")
    inputs = int(modules[0].weight.shape[1]) * int(modules[0].groups)
    outputs = int(modules[-1].weight.shape[0])
    maps = tuple(port.module for port in ports)
    return Block(tuple(sites), ports[0], ports[-1], maps, inputs, outputs, kernel, stride, same)


def observe_blocks(
    model: nn.Module,
    batches: Iterable[Any],
    blocks: Sequence[Block],
    *,
    seed: int = 0,
    memory: float = 2e9,
    finished: Callable[[Sequence[Block]], None] = lambda _: None,
) -> None:
    """Fill in what data tells about blocks; one that turns out to be of another shape has no rows afterwards.

    `finished` is given the blocks of each pass.
    """
    for group in in_passes(blocks, _features, memory):
        _observe(model, batches, group, seed)
        finished(group)


def _features(block: Block) -> list[int]:
    """Of each kernel's covariance."""
    return [(block.inputs + 1) * k * k + block.outputs for k in block.kernels]


def _observe(model: nn.Module, batches: Iterable[Any], blocks: Sequence[Block], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    seen: dict[str, dict[str, Tensor]] = {block.name: {} for block in blocks}
    with watching(model, lambda source: _hooks(model, blocks, seen, source)) as source:
        for batch in read_batches(model, batches):
            scalar, positions = projection(batch.run(model), batch, generator)
            if scalar.requires_grad:
                torch.autograd.grad(scalar, source, allow_unused=True)
            for block in blocks:
                _take(block, seen[block.name], generator, positions)
                seen[block.name].clear()


@torch.no_grad()
def _take(block: Block, seen: dict[str, Tensor], generator: torch.Generator, positions: int) -> None:
    if "x" not in seen or "y" not in seen:
        return
    x, y = seen["x"], seen["y"]
    block.shape = block.shape or tuple(x.shape)
    rows = max((found.count for found in block.rows.values()), default=0)
    count = positions_for(rows, max((len(found.mean) for found in block.rows.values()), default=1))
    place = torch.randperm(math.prod(y.shape[2:]), generator=generator)[:count].to(x.device)
    target = y.flatten(2)[:, :, place].transpose(1, 2).flatten(0, 1)
    for kernel in block.kernels:
        parts = [_patches(block, some, kernel, tuple(y.shape[2:]), place) for some in x.split(8)]
        if any(part is None for part in parts):
            block.rows.pop(kernel, None)
            continue
        features = torch.cat([part for part in parts if part is not None])
        if kernel not in block.rows:
            block.rows[kernel] = Covariance(features.shape[1] + block.outputs, x.device)
        block.rows[kernel].update(torch.cat((features, target.to(features)), 1))
    if "g" in seen:
        g = seen["g"].transpose(0, 1).flatten(1).double()
        total = (g @ g.t()).to(block.rows[block.kernels[0]].mean) if block.rows else (g @ g.t())
        block.sensitivity = total if block.sensitivity is None else block.sensitivity + total
        block.samples += positions


def _patches(block: Block, x: Tensor, kernel: int, size: tuple[int, ...], place: Tensor) -> Tensor | None:
    """Patches (R, (I + 1) * k * k) at some positions, those of a channel of ones last; None if the sizes do not fit."""
    x = torch.cat((x, torch.ones_like(x[:, :1])), 1)
    if block.same:
        x = pad_same(x, [kernel, kernel], list(block.stride), [1, 1])
    unfolded = functional.unfold(x, kernel, padding=0 if block.same else kernel // 2, stride=block.stride)
    if unfolded.shape[2] != math.prod(size):
        return None
    return unfolded[:, :, place].transpose(1, 2).flatten(0, 1)


def _hooks(
    model: nn.Module, blocks: Sequence[Block], seen: dict[str, dict[str, Tensor]], source: Tensor
) -> Iterator[Any]:
    def begin(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def see(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            seen[name]["x"] = batched(inputs[0].detach(), 2)

        return see

    def end(name: str) -> Callable[[nn.Module, Any, Tensor], Tensor]:
        def see(_: nn.Module, __: Any, output: Tensor) -> Tensor:
            seen[name]["y"] = batched(output.detach(), 2)
            output = output + source.to(output.dtype)
            if output.requires_grad:
                output.register_hook(lambda gradient: seen[name].__setitem__("g", batched(gradient.detach(), 2)))
            return output

        return see

    for block in blocks:
        yield model.get_submodule(block.first.module).register_forward_pre_hook(begin(block.name))
        yield model.get_submodule(block.last.module).register_forward_hook(end(block.name))


@torch.no_grad()
def replace_block(model: nn.Module, block: Block, kernel: int, found: BlockFit) -> None:
    """Put one convolution in the place of a block of a gated model; its sites have no gates any more."""
    from linearize.collapse import unfold

    steps: list[Step] = []
    paths = {id(module): path for path, module in model.named_modules()}
    named = gates(model)
    taken = [paths[id(named[site.name])] for site in block.sites]
    for site in block.sites:
        steps += unfold(model, site)
    for path in taken:
        steps.append(_put(model, path, {"type": "Identity"}))
    old: Any = model.get_submodule(block.first.module)
    spec = block.spec(kernel, bordered=found.border is not None)
    steps.append(_put(model, block.first.module, spec))
    layer: Any = model.get_submodule(block.first.module)
    layer.to(old.weight.device, old.weight.dtype)
    values: dict[str, Any] = {"weight": found.weight, "bias": found.bias, "border": found.border}
    for role, (holder, name) in roles_of(layer).items():
        holder.get_parameter(name).copy_(values[role])
    for parameter in layer.parameters():
        parameter.requires_grad_(old.weight.requires_grad)
    steps += [_put(model, path, {"type": "Identity"}) for path in block.maps[1:]]
    record = record_of(model) or Record()
    gone = {site.name for site in block.sites}
    why = "its block became one convolution"
    sites = tuple(replace(site, ungated=why) if site.name in gone else site for site in record.sites)
    set_record(model, Record(sites, [*record.steps, *steps], record.inputs))


def _put(model: nn.Module, path: str, spec: Spec) -> Step:
    replace_module(model, path, build(spec, model.get_submodule(path)))
    return {"path": path, "module": spec}
