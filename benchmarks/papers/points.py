"""Inputs on which a ReLU network shows as much of itself as possible.

Shape letters: N points, D inputs, C units of a layer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

__all__ = ["Chosen", "choose"]

_STARTING, _CLIMBERS, _STEPS = 2**14, 64, 100  # of the ascent: candidates, those that climb, steps
_DECADES = 3.0  # distances from 0 spread over so many, so that kinks near 0 are seen, too


@dataclass(frozen=True)
class Chosen:
    """Points, and what was seen when they were chosen.

    Attributes:
        points: (N, D).
        constant: units that were active at none of the candidates.
    """

    points: Tensor
    constant: int


@torch.no_grad()
def choose(model: nn.Sequential, candidates: int, generator: torch.Generator) -> Chosen:
    """Points for the functional dimension of a fully connected ReLU network.

    Of the candidates, at most D + 1 of each linear region: there the Jacobian is affine in x. Of these, 8 for each
    parameter where something rare happens, and 4 for each parameter at random. To them come points, found by ascent,
    where two units of neighbouring layers are active together that are so at none of the candidates. In random order.
    """
    first = next(module for module in model.modules() if isinstance(module, nn.Linear))
    x = cloud(candidates, first.in_features, generator)
    layers = active(model, x)
    constant = sum(int((layer.sum(0) == 0).sum()) for layer in layers)
    sought = climb(model, x, layers)
    kept = per_region(torch.cat(layers, 1), first.in_features + 1)
    x, layers = x[kept], [layer[kept] for layer in layers]
    parameters = sum(p.numel() for p in model.parameters())
    rare = torch.argsort(rarity(layers))[: 8 * parameters]
    others = torch.randperm(len(x), generator=generator)[: 4 * parameters]
    points = torch.cat((x[torch.cat((rare, others)).unique()], sought))
    return Chosen(points[torch.randperm(len(points), generator=generator)], constant)


def cloud(count: int, size: int, generator: torch.Generator) -> Tensor:
    """Normal points (N, D), scaled by 10 ** u with u uniform over three decades up to 10 ** 0.5."""
    scale = 10 ** (0.5 - _DECADES * torch.rand(count, 1, generator=generator))
    return torch.randn(count, size, generator=generator) * scale


def inner(model: nn.Sequential, x: Tensor) -> list[Tensor]:
    """What the units of each layer get: (N, C) each."""
    found = []
    for module in model:
        if isinstance(module, nn.ReLU):
            found.append(x)
        x = module(x)
    return found


def climb(model: nn.Sequential, x: Tensor, layers: list[Tensor]) -> Tensor:
    """Points where pairs of units are active together that are so at none of x; none for a pair that resists.

    Gradient ascent on the smaller of the two inputs, relative to the distance from 0, from the most promising of x.
    """
    part = x[:_STARTING]
    values = inner(model, part)
    found = [x[:0]]
    for place in range(1, len(layers)):
        together = layers[place - 1].float().T @ layers[place].float()
        seen = layers[place - 1].any(0)[:, None] & layers[place].any(0)  # a constant unit resists with all others
        for one, other in ((together == 0) & seen).nonzero().tolist():
            least = torch.minimum(values[place - 1][:, one], values[place][:, other]) / part.norm(dim=1)
            y = part[least.topk(_CLIMBERS).indices]
            found.append(_ascend(model, y / y.norm(dim=1, keepdim=True), place, one, other))
    return torch.cat(found)


@torch.enable_grad()
def _ascend(model: nn.Sequential, y: Tensor, place: int, one: int, other: int) -> Tensor:
    """The climbers that arrive."""
    y = y.detach().clone().requires_grad_()
    for _ in range(_STEPS):
        values = inner(model, y)
        least = torch.minimum(values[place - 1][:, one], values[place][:, other])
        if bool((least > 0).any()):
            return y.detach()[least > 0]
        (slope,) = torch.autograd.grad(least.sum(), y)
        y = (y + 0.05 * slope / slope.norm(dim=1, keepdim=True).clamp_min(1e-12) * y.norm(dim=1, keepdim=True)).detach()
        y.requires_grad_()
    return y.detach()[:0]


def active(model: nn.Sequential, x: Tensor) -> list[Tensor]:
    """Which units of each layer are active: bool (N, C) each."""
    return [values > 0 for values in inner(model, x)]


def per_region(pattern: Tensor, most: int) -> Tensor:
    """Indices of at most so many points of each pattern of activity, bool (N, units)."""
    weights = torch.randint(1, 2**40, (pattern.shape[1],), generator=torch.Generator().manual_seed(0))
    key = (pattern.long() * weights).sum(1)  # sums of random numbers: two patterns are all but never the same
    order = torch.argsort(key, stable=True)
    new = torch.ones(len(key), dtype=torch.bool)
    new[1:] = key[order][1:] != key[order][:-1]
    places = torch.arange(len(key))
    begin = torch.where(new, places, 0).cummax(0).values
    return order[places - begin < most]


def rarity(layers: list[Tensor]) -> Tensor:
    """How often the rarest thing happens that happens at each point: float (N,).

    Things are: a unit is active, a unit is not, a unit and one of the layer before are active together.
    """
    count = len(layers[0])
    score = torch.full((count,), float(count))
    before: Tensor | None = None
    for layer in layers:
        on = layer.float().sum(0)
        score = torch.minimum(score, torch.where(layer, on, count - on).amin(1))
        if before is not None:
            joint = before.float().T @ layer.float()
            for unit, often in enumerate(joint.T):
                both = before & layer[:, unit : unit + 1]
                score = torch.minimum(score, torch.where(both, often, float(count)).amin(1))
        before = layer
    return score
