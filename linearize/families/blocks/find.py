"""Find blocks that one dense convolution could replace: expand, depthwise, project, with both activations.

On most hardware, one dense convolution is faster than a chain of thin ones with fewer FLOPs (Fu et al.,
"DepthShrinker", ICML 2022). The kernel is fitted by least squares from patches of the block's input to the block's
output on data. It may be smaller than the block's own kernel. The replacement is approximate, and its loss is predicted
as for every other option. Zero padding inside a block makes its bias different near the border. A channel of ones,
padded like the rest, learns this.

Shape letters: I inputs and O outputs of the block, k kernel, R rows (positions).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from linearize.algebra.covariance import Covariance
from linearize.algebra.piece import Infeasible
from linearize.gating.gate import gates
from linearize.sites.site import Port, Site
from linearize.surgery.specs import Spec
from linearize.tensors import meddler

__all__ = ["Block", "blocks_of"]

_WIDEST = 4000  # features of a patch


@dataclass
class Block:
    """A chain of sites between two maps, and its statistics.

    Attributes:
        sites: of the chain, in order.
        first, last: the map that the block begins with, and the one it ends with.
        maps: paths of all its maps, in order.
        kernel, stride: of the dense convolution with the block's own reach.
        same: padding by the "SAME" rule.
        rows: covariance of (patches, output), by kernel size.
        misfits: kernel sizes whose patches were not one for each output.
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
    misfits: set[int] = field(default_factory=set)
    sensitivity: Tensor | None = None
    samples: float = 0.0
    shape: tuple[int, ...] = ()

    def state(self) -> dict[str, Any]:
        """The sums, as plain values and tensors. `restore` reads them back."""
        rows = {kernel: rows.state() for kernel, rows in self.rows.items()}
        plain = {"samples": self.samples, "shape": tuple(self.shape), "misfits": tuple(sorted(self.misfits))}
        return {**plain, "rows": rows, "sensitivity": self.sensitivity}

    def restore(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Restore the result of `state`."""
        self.misfits = set(state.get("misfits", ()))
        self.rows = {kernel: Covariance.of(rows, device) for kernel, rows in state["rows"].items()}
        sensitivity: Tensor | None = state["sensitivity"]
        self.sensitivity = None if sensitivity is None else sensitivity.to(device)
        self.samples, self.shape = state["samples"], state["shape"]

    def merge(self, other: Block) -> None:
        """Add the sums of another one, from other batches."""
        self.misfits |= other.misfits
        for kernel, rows in other.rows.items():
            if kernel in self.rows:
                self.rows[kernel].merge(rows)
            else:
                self.rows[kernel] = rows
        for kernel in self.misfits:
            self.rows.pop(kernel, None)
        if other.sensitivity is not None:
            mine = 0.0 if self.sensitivity is None else self.sensitivity
            self.sensitivity = other.sensitivity + mine
        self.samples += other.samples
        self.shape = self.shape or other.shape

    @property
    def name(self) -> str:
        """The name of its first site."""
        return self.sites[0].name

    @property
    def kernels(self) -> list[int]:
        """Kernel sizes to try: its own, and a smaller one."""
        own = max(self.kernel)
        return [k for k in dict.fromkeys((own, 3)) if k <= own and k * k * self.inputs <= _WIDEST]

    def spec(self, kernel: int, *, bordered: bool = False) -> Spec:
        """The description of the layer that would replace the block."""
        padding = [0, 0] if self.same else [kernel // 2] * 2
        sizes = {"in_channels": self.inputs, "out_channels": self.outputs, "kernel_size": [kernel] * 2}
        rest = {"stride": list(self.stride), "padding": padding, "dilation": [1, 1], "groups": 1, "bias": True}
        kind = ("Border" if bordered else "") + ("SameConv2d" if self.same else "Conv2d")
        return {"type": kind, **sizes, **rest}

    def flops(self, kernel: int, *, bordered: bool = False) -> float:
        """FLOPs of that layer for the example batch. A border is computed once for the whole batch."""
        images = max(1, self.shape[0]) if self.shape else 1
        inputs = self.inputs + (1 / images if bordered else 0)
        return 2.0 * self.last.positions * inputs * self.outputs * kernel**2


def blocks_of(model: nn.Module, groups: Sequence[Sequence[str]]) -> list[Block]:
    """The groups of sites that one convolution could replace: chains of plain maps with at least one spatial map."""
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


def _check_hooks(model: nn.Module, sites: list[Site], ports: list[Port]) -> None:
    inside = [port.module for port in ports]
    inside += [part for site in sites for part in (site.name, *(f.module for f in (*site.folds, *site.consumer_folds)))]
    for path in inside:
        if any(meddler(part) for part in model.get_submodule(path).modules()):
            raise Infeasible(f"{path} has a hook, or a forward put on it")


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
    _check_hooks(model, sites, ports)
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
