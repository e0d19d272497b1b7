"""The linear maps around a site, with their kind and their place, to observe them and to write new weights.

Shape letters: I inputs, C channels, g features per channel (the kernel positions of a spatial consumer), O outputs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from linearize.algebra.piece import Infeasible
from linearize.sites.site import Fold, Port, Site
from linearize.surgery.folds import scale_shift
from linearize.surgery.narrow import coupled_sites
from linearize.surgery.probe import has_own_forward, probed
from linearize.tensors import meddler

__all__ = [
    "Consumer",
    "columns_of",
    "consumers_of",
    "conv_groups",
    "fold_of",
    "matrix",
    "obstacle_to_refit",
    "write_columns",
    "write_matrix",
]

# Features beyond which the covariance would not fit a sensible memory or time. Gathering patches takes its time, too; a
# matrix that reads more channels than that is one of a large model.
_WIDEST_SPATIAL, _WIDEST = 5000, 32_000


@dataclass(frozen=True)
class Consumer:
    """A consumer of a site as a matrix (O, C * g) of what it reads."""

    port: Port
    module: nn.Module
    outputs: int
    group: int

    @property
    def columns(self) -> slice:
        """Its columns for the site's channels: all of them, except behind a concatenation."""
        return slice(self.port.start * self.group, self.port.stop * self.group)

    def reads(self, x: Tensor) -> Tensor:
        """The site's channels in its input."""
        return (
            x if self.port.whole else x.narrow(-1 - self.port.dims, self.port.start, self.port.stop - self.port.start)
        )

    @property
    def spatial(self) -> bool:
        """True if it reads more than one position at a time."""
        return self.group > 1


def matrix(model: nn.Module, port: Port) -> Tensor:
    """The weight of a map in float64, outputs first and everything else flattened: (O, I * g)."""
    module: Any = model.get_submodule(port.module)
    weight: Tensor = module.weight.detach().double()
    return (weight.t() if port.transposed else weight).flatten(1)


@torch.no_grad()
def write_matrix(model: nn.Module, port: Port, value: Tensor) -> None:
    """Write a whole weight (O, I * g), in the dtype that it has."""
    weight: Any = model.get_submodule(port.module).weight
    value = value.t() if port.transposed else value
    weight.copy_(value.reshape(weight.shape))


def columns_of(model: nn.Module, consumer: Consumer) -> Tensor:
    """The weight of a consumer for a site's channels, (O, C * g), in float64."""
    return matrix(model, consumer.port)[:, consumer.columns]


def write_columns(model: nn.Module, consumer: Consumer, value: Tensor) -> None:
    """Write the weight of a consumer for a site's channels (O, C * g)."""
    whole = matrix(model, consumer.port)
    whole[:, consumer.columns] = value
    write_matrix(model, consumer.port, whole)


def bias_of(model: nn.Module, port: Port, outputs: int) -> Tensor:
    """The bias of a map in float64; zeros where it has none."""
    module: Any = model.get_submodule(port.module)
    bias = getattr(module, "bias", None)
    found: Tensor = module.weight.new_zeros(outputs) if bias is None else bias.detach()
    return found.double()


@torch.no_grad()
def write_bias(model: nn.Module, port: Port, value: Tensor) -> None:
    """Write a bias. A layer without a bias gets one if the new bias is not zero."""
    module: Any = model.get_submodule(port.module)
    if module.bias is not None:
        module.bias.copy_(value)
    elif bool((value != 0).any()):
        module.bias = nn.Parameter(value.to(module.weight), requires_grad=module.weight.requires_grad)


def consumers_of(model: nn.Module, site: Site) -> tuple[Consumer, ...]:
    """The consumers of a site."""
    found = []
    for port in site.consumers:
        module: Any = model.get_submodule(port.module)
        weight = module.weight
        found.append(Consumer(port, module, weight.shape[1 if port.transposed else 0], math.prod(weight.shape[2:])))
    return tuple(found)


def obstacle_to_refit(model: nn.Module, site: Site | None) -> str | None:
    """The reason why the consumers of a site cannot be refitted by least squares; None if they can."""
    if site is None:
        return "it was put in by hand"
    if site.reason is not None or not site.consumers or site.producer is None:
        return site.reason or "no linear map before or after it"
    for port in (site.producer, site.up, *site.consumers):
        found = None if port is None else meddler(model.get_submodule(port.module))
        if port is not None and found is not None:
            return f"{port.module} has {found}, which would be lost: take it off before, put it on again afterwards"
        if port is not None and not _plain(model, port):
            return f"the weight of {port.module} is computed, and no layer with a plain one does the same"
        grouped = port is not None and conv_groups(model, port) > 1
        if port is not None and grouped and not (port == site.producer and _narrows(model, site)):
            return f"{port.module} has groups"
    why = _obstacle_between(site)
    if why is not None:
        return why
    kinds = consumers_of(model, site)
    if len({consumer.group for consumer in kinds}) > 1:
        return "its consumers look at different numbers of positions"
    if kinds[0].spatial and (len(kinds) > 1 or kinds[0].port.dims != 2):
        return "several consumers, or not of two dimensions, that look at more than one position"
    if kinds[0].spatial and (isinstance(kinds[0].module.padding, str) or not has_own_forward(kinds[0].module)):
        return "the padding of its consumer depends on the size, or is given in words"
    features, most = kinds[0].group * site.channels, _WIDEST_SPATIAL if kinds[0].spatial else _WIDEST
    if features > most:
        return f"its consumer reads {features} features, more than {most}"
    return None


def _obstacle_between(site: Site) -> str | None:
    """Why what lies between the activation and its consumers forbids a fit: not all of them read the same."""
    if site.parts > 1:
        return "its channels are taken apart behind the activation"
    if site.bent and len(site.consumers) > 1:
        return "a maximum over positions lies before one of several consumers"
    if len({port.module for port in site.consumers}) < len(site.consumers):
        return "one of its consumers reads it at two places of a concatenation"
    if len({frozenset(index for index, *_ in port.folds) for port in site.consumers}) > 1:
        return "a constant map per channel lies before one of several consumers"
    return None


def conv_groups(model: nn.Module, port: Port) -> int:
    """The number of groups of a map; 1 for a matrix."""
    return int(getattr(model.get_submodule(port.module), "groups", 1))


def _narrows(model: nn.Module, site: Site) -> bool:
    """True if its producer is a depthwise map whose channels can leave the maps before it as well."""
    from linearize.gating.gate import gates

    return any(chain.lower == site for chain in coupled_sites(model, (gate.site for gate in gates(model).values())))


def _plain(model: nn.Module, port: Port) -> bool:
    """True if the map is linear in a weight that can be written."""
    module: Any = model.get_submodule(port.module)
    weight = module._parameters.get("weight")
    if weight is None or "bias" not in module._parameters:
        return False
    if has_own_forward(module):
        return True
    if not port.transposed and getattr(module, "padding_mode", "zeros") != "zeros":
        return False
    try:
        found = probed(port, module)
    except Infeasible:
        return False
    own = weight.detach().double()
    own = own.t() if port.transposed else own
    return found.weight.shape == own.shape and torch.allclose(found.weight, own, rtol=1e-5, atol=1e-7)


def fold_of(model: nn.Module, folds: tuple[Fold, ...], channels: int) -> tuple[Tensor, Tensor]:
    """Scale and shift of the constant maps between a producer and its activation, in float64, both (C,)."""
    like: Any = next(model.parameters())
    scale = torch.ones(channels, dtype=torch.float64, device=like.device)
    shift = torch.zeros_like(scale)
    for fold in folds:
        s, t = (value.to(like.device) for value in scale_shift(fold, lambda name: _tensor(model, name), channels))
        scale, shift = scale * s, shift * s + t
    return scale, shift


def _tensor(model: nn.Module, name: str) -> Tensor:
    path, _, attribute = name.rpartition(".")
    found: Tensor = getattr(model.get_submodule(path), attribute).detach()
    return found
