"""The layers of a group one after the other, as one module of the group's input, so that they can be timed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from linearize.families.channels.editable import fold_of
from linearize.families.channels.layers import released
from linearize.families.family import Assembled
from linearize.gating.gate import ChannelGate
from linearize.gating.groups import ports_of
from linearize.sites.site import Port, Site

__all__ = ["present_layers", "with_layers"]


def present_layers(model: nn.Module, chain: Sequence[ChannelGate]) -> Assembled:
    """The layers of a group as they stand in the model, norms included, gates not."""
    ports = {port.module for gate in chain if gate.site is not None for port in ports_of(gate.site)}
    layers = {path: model.get_submodule(path) for path in ports}
    layers |= {f"{gate.site.name} activation": released(gate) for gate in chain if gate.site is not None}
    folds = {}
    for gate in chain:
        if gate.site is not None and gate.site.folds:
            scale, shift = fold_of(model, gate.site.folds, gate.channels)
            weight = next(model.parameters())
            folds[gate.site.name] = (scale.to(weight), shift.to(weight))
    sites = [(repr(released(gate)), gate.axis, gate.channels, len(_folds(gate.site))) for gate in chain]
    before = [(p.kind, p.total) for gate in chain if gate.site is not None for p in ports_of(gate.site)]
    return Assembled(_InOrder(chain, layers, folds), [sites, before])


def with_layers(chain: Sequence[ChannelGate], layers: Mapping[str, nn.Module]) -> nn.Module:
    """The same with an option's layers. Norms are folded into them."""
    return _InOrder(chain, layers, {})


def _folds(site: Site | None) -> tuple[Any, ...]:
    return () if site is None else (*site.folds, *site.up_folds, *site.consumer_folds)


class _InOrder(nn.Module):
    """Runs the layers of a group one after the other, as the model would."""

    def __init__(
        self, chain: Sequence[ChannelGate], layers: Mapping[str, nn.Module], folds: dict[str, tuple[Tensor, Tensor]]
    ) -> None:
        super().__init__()
        self.gates, self.layers, self.folds = tuple(chain), dict(layers), folds
        self.held = nn.ModuleList(layers.values())  # an exporter looks for weights in modules only
        self.training = False

    def forward(self, x: Tensor) -> Any:
        """The outputs of the last layers."""
        outputs: list[Tensor] = []
        for gate in self.gates:
            site = gate.site
            if site is None or site.producer is None:
                raise ValueError("a site without a producer")
            if not outputs:
                outputs = [self._layer(site.producer)(x)]
            h = outputs[0]
            up: Tensor | None = None
            if site.up is not None:
                if site.up.module == site.producer.module:
                    first, second = h.chunk(2, -1)
                    h, up = (first, second) if site.producer.start == 0 else (second, first)
                else:
                    up = self._layer(site.up)(x)
            if site.name in self.folds:
                scale, shift = self.folds[site.name]
                axis = -gate.axis - 1
                h = _norm(h, scale, shift, axis)
            h = self.layers[f"{site.name} activation"](h)
            h = h if up is None else h * up
            outputs = [self._layer(port)(h) for port in site.consumers]
        return outputs

    def _layer(self, port: Port) -> nn.Module:
        return self.layers[port.module]


def _norm(h: Tensor, scale: Tensor, shift: Tensor, axis: int) -> Tensor:
    """A norm in eval mode costs what this costs."""
    if axis == h.dim() - 2:
        return functional.batch_norm(h, torch.zeros_like(shift), torch.ones_like(scale), scale, shift)
    sizes = (-1, *(1,) * axis)
    return torch.addcmul(shift.view(sizes), h, scale.view(sizes))
