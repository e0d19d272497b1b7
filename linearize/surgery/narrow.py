"""Chains through a depthwise map (expand, depthwise, project): a channel can be removed from all of their maps at once.

Each channel passes a depthwise map separately. If a channel is constant behind the second activation, nothing needs its
row of the expanding map, nor its kernel in the depthwise map. The constant goes into the biases of the consumers, and
the channel is removed, whatever its first activation is. The same holds if its first activation is always zero.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from linearize.algebra.affine import columns, rows
from linearize.algebra.piece import Infeasible, Piece, Pieces
from linearize.gating.gate import ChannelGate
from linearize.sites.site import Port, Site
from linearize.surgery.maps import Reader
from linearize.tensors import held

__all__ = ["CoupledSites", "constant_channels", "coupled_sites", "narrow"]


@dataclass(frozen=True)
class CoupledSites:
    """Two sites with a depthwise map between them: the upper one's only consumer is the lower one's producer."""

    upper: Site
    lower: Site

    @property
    def ports(self) -> tuple[Port, ...]:
        """All of its maps, in order."""
        return tuple(port for port in (self.upper.producer, self.lower.producer, *self.lower.consumers) if port)


def coupled_sites(model: nn.Module, sites: Iterable[Site | None]) -> list[CoupledSites]:
    """The chains among sites, in order.

    Examples:
        >>> import linearize
        >>> net = nn.Sequential(
        ...     nn.Conv2d(2, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.ReLU(), nn.Conv2d(8, 2, 1)
        ... )
        >>> gated = linearize.convert(net, torch.randn(1, 2, 5, 5))
        >>> sites = [gate.site for gate in linearize.gates(gated).values()]
        >>> [(c.upper.name, c.lower.name) for c in coupled_sites(gated, sites)]
        [('1', '3')]
    """
    able = [site for site in sites if site is not None and _able(site)]
    lower = {site.producer.module: site for site in able if site.producer is not None}
    found = []
    for site in able:
        below = lower.get(site.consumers[0].module)
        if below is None or len(site.consumers) > 1 or site.consumer_folds or below.channels != site.channels:
            continue
        chain = CoupledSites(site, below)
        first, middle, *last = (getattr(model.get_submodule(port.module), "groups", 1) for port in chain.ports)
        weight = held(model.get_submodule(chain.ports[1].module), "weight")
        depthwise = weight is not None and tuple(weight.shape[:2]) == (middle, 1) and middle == site.channels
        if depthwise and middle > 1 and first == 1 and set(last) == {1}:
            found.append(chain)
    return found


def _able(site: Site) -> bool:
    ports = (site.producer, *site.consumers)
    whole = all(port is not None and port.start == 0 and port.stop == port.total for port in ports)
    return site.reason is None and site.up is None and bool(site.consumers) and whole


def constant_channels(chain: CoupledSites, found: Mapping[str, ChannelGate], masks: Mapping[str, Tensor]) -> Tensor:
    """The channels of which a chain passes on no more than a constant: bool (C,), on the CPU.

    Args:
        chain: which.
        found: the gates of the model, by name.
        masks: the linear channels of every gate.
    """
    upper, lower = found[chain.upper.name], found[chain.lower.name]
    if upper.slope.device.type == "meta":
        return torch.zeros(lower.channels, dtype=torch.bool)
    constant = masks[chain.lower.name] & (lower.slope == 0).cpu()
    silent = masks[chain.upper.name] & (upper.slope == 0).cpu() & (upper.intercept == 0).cpu()
    return constant | silent if chain.lower.steady else constant & (lower.intercept == 0).cpu()


def narrow(reader: Reader, chain: CoupledSites, found: Mapping[str, ChannelGate], gone: Tensor) -> Pieces:
    """The maps of a chain without some of its channels. Their constants are added to the consumers' biases.

    Args:
        reader: of the gated model.
        chain: which.
        found: the gates of the model, by name.
        gone: bool (C,), some of `constant_channels`, but not all channels.

    Raises:
        Infeasible: a map has been given another form, or is none of a kind that can be narrowed.
    """
    upper, lower = chain.upper, chain.lower
    if upper.producer is None or lower.producer is None or bool(gone.all()):
        raise Infeasible("no channel of the chain is left")
    for site in (upper, lower):
        reader.check_replaceable(site, found[site.name])
    keep, left = reader.index(~gone), reader.index(gone)
    middle = reader.depthwise(lower)
    pieces: Pieces = {
        upper.producer.module: Piece("plain", rows(reader.produced(upper), keep)),
        lower.producer.module: Piece(
            "plain", replace(middle, weight=middle.weight[keep], bias=middle.bias[keep], groups=int((~gone).sum()))
        ),
    }
    constant = _constants(reader, found[lower.name], middle.bias, gone)
    for port in lower.consumers:
        consumer = reader.consumed(port, lower)
        if consumer.padded and (reader.device == "meta" or bool((constant != 0).any())):
            raise Infeasible("a constant behind zero padding does not reach every position alike")
        lost = columns(consumer, left).weight
        lost = lost.flatten(2).sum(2) if consumer.dims else lost
        pieces[port.module] = Piece("plain", replace(columns(consumer, keep), bias=consumer.bias + lost @ constant))
    return pieces


def _constants(reader: Reader, gate: ChannelGate, bias: Tensor, gone: Tensor) -> Tensor:
    """What the lower activation gives for channels that go, in float64, (G,)."""
    if reader.device == "meta":
        return bias[reader.index(gone)]
    own = copy.deepcopy(gate).double().eval()
    with torch.no_grad():
        value: Tensor = own(bias.view(-1, *(1,) * (-1 - gate.axis)).clone())
    return value.flatten()[gone.to(value.device)]
