"""A canonical form: networks that differ only by positive rescalings and the order of channels get the same form."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from linearize.analysis.dimension import scalable
from linearize.analysis.reduce import weight_of
from linearize.analysis.units import inputs_of
from linearize.convert import eager_model
from linearize.errors import UsageError
from linearize.gating.gate import gates
from linearize.graph.discover import discover
from linearize.sites.site import Site

__all__ = ["canonical", "canonical_distance"]

_DIGITS = 9  # channels are ordered by their weights up to so many digits, so that rounding does not change the order


def canonical(model: nn.Module, example_inputs: Any = None) -> nn.Module:
    """Make a model with the same function, whose hidden channels are scaled and ordered in a standard way.

    Every channel of a ReLU-like site is scaled so that its producer's row `(w, b)` has norm 1, and its consumers are
    multiplied by the factor. The channels of every site are ordered by their rows. This goes from the first site to the
    last. Some sites are not changed: those with norms or shared weights around, gated units, grouped convolutions.

    Args:
        model: a plain model. It is not changed.
        example_inputs: as for `linearize.convert`.

    Raises:
        UsageError: the model has gates.

    Examples:
        >>> net = nn.Sequential(nn.Linear(1, 2), nn.ReLU(), nn.Linear(2, 1))
        >>> with torch.no_grad():
        ...     _ = net[0].weight.copy_(torch.tensor([[3.0], [-1.0]])), net[0].bias.zero_()
        >>> canonical(net, torch.randn(1, 1))[0].weight.tolist()
        [[-1.0], [1.0]]
    """
    model = eager_model(model)
    if gates(model):
        raise UsageError(type(model).__name__, "has gates", "Collapse it first.")
    inputs = inputs_of(model, example_inputs)
    result = copy.deepcopy(model)
    with torch.no_grad():
        for site in discover(model, inputs):
            _settle(result, site)
    return result


def _settle(model: nn.Module, site: Site) -> None:
    """Scale and order the channels of one site."""
    if site.producer is None or site.reason is not None or site.gated_unit or site.folds or site.consumer_folds:
        return
    rows, columns = weight_of(model, site.producer), [weight_of(model, port) for port in site.consumers]
    readers = [column for column in columns if column is not None and column.shape[1] == site.channels]
    if rows is None or rows.shape[0] != site.channels or len(readers) != len(columns):
        return
    held = model.get_submodule(site.producer.module)._parameters.get("bias")
    bias = held.detach() if held is not None else None
    if scalable(site):
        norms = _whole(rows, bias).norm(dim=1)
        norms = torch.where(norms > 0, norms, torch.ones_like(norms))
        rows.div_(norms.view(-1, *(1,) * (rows.dim() - 1)))
        if bias is not None:
            bias.div_(norms)
        for reader in readers:
            reader.mul_(norms.view(1, -1, *(1,) * (reader.dim() - 2)))
    keys = [tuple(round(value, _DIGITS) for value in row) for row in _whole(rows, bias).double().tolist()]
    order = torch.tensor(sorted(range(len(keys)), key=keys.__getitem__), device=rows.device)
    rows.copy_(rows[order])
    if bias is not None:
        bias.copy_(bias[order])
    for reader in readers:
        reader.copy_(reader[:, order])


def _whole(rows: Tensor, bias: Tensor | None) -> Tensor:
    return rows.flatten(1) if bias is None else torch.cat((rows.flatten(1), bias[:, None]), 1)


def canonical_distance(a: nn.Module, b: nn.Module, example_inputs: Any = None) -> float:
    """The largest difference between the parameters of two models in canonical form. Infinite if shapes differ.

    Raises:
        UsageError: a model has gates.

    Examples:
        >>> import copy
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1)).double()
        >>> other = copy.deepcopy(net)
        >>> with torch.no_grad():
        ...     _ = other[0].weight.copy_(2 * net[0].weight.flip(0)), other[0].bias.copy_(2 * net[0].bias.flip(0))
        ...     _ = other[2].weight.copy_(net[2].weight.flip(1) / 2)
        >>> canonical_distance(net, other, torch.randn(1, 2, dtype=torch.float64)) < 1e-12
        True
    """
    first, second = (dict(canonical(model, example_inputs).named_parameters()) for model in (a, b))
    if {n: p.shape for n, p in first.items()} != {n: p.shape for n, p in second.items()}:
        return float("inf")
    differences = [float((p - second[name]).detach().abs().max()) for name, p in first.items() if p.numel()]
    return max(differences, default=0.0)
