"""Remove hidden symmetries from a model: the same function with fewer channels."""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from linearize import checks
from linearize.analysis.symmetry import Symmetry
from linearize.analysis.units import zeros_like_inputs
from linearize.collapse import collapse
from linearize.convert import convert, eager_model
from linearize.errors import UsageError
from linearize.gating.gate import ChannelGate, gates
from linearize.plan import When
from linearize.running.models import device_of
from linearize.sites.site import Port, Site
from linearize.surgery.probe import has_own_forward

__all__ = ["reduce"]

_log = logging.getLogger(__name__)


def reduce(model: nn.Module, symmetries: Sequence[Symmetry], *, when: When = "cheaper") -> nn.Module:
    """Make a model without the channels that `hidden_symmetries` found, with the same function where they were found.

    Inactive and unseen channels are dropped, and their constant is added to the bias. Active channels become linear and
    are collapsed. Of parallel channels, the first one stays, and the outgoing weights of the others are added to its
    own. With evidence "box" the function is the same for every input of the box, with "data" on the inputs seen.

    Args:
        model: the model that was analysed, plain or converted. It is not changed.
        symmetries: records of that model. Pass all of them: one may be true only if another is applied as well.
        when: as for `linearize.collapse`. With "cheaper", an active channel stays without its activation if merging it
            would cost more. "always" merges every active channel.

    Returns:
        A new model without gates. Some layers cannot be changed (at a residual sum, say). A channel between them
        stays without its activation, and parallel channels there are not changed.

    Raises:
        UsageError: a record names a site or a channel that the model does not have.

    Examples:
        >>> from linearize.analysis import hidden_symmetries
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
        >>> with torch.no_grad():
        ...     _ = net[0].bias.copy_(torch.tensor([-50.0, 50.0, 0.0]))
        >>> x = torch.randn(9, 2)
        >>> small = reduce(net, hidden_symmetries(net, x))
        >>> small[0].out_features, bool(torch.allclose(small(x), net(x), atol=1e-4))
        (2, True)
    """
    checks.choice("when", when, ("cheaper", "always"))
    model = eager_model(checks.module("model", model))
    if not isinstance(symmetries, Sequence) or not all(isinstance(record, Symmetry) for record in symmetries):
        checks.refuse("symmetries", symmetries, "what hidden_symmetries gave")
    if not symmetries:
        return copy.deepcopy(model)
    gated = copy.deepcopy(model)
    if not gates(gated):
        args, kwargs = zeros_like_inputs(symmetries[0].inputs, device_of(model))
        gated = convert(gated, kwargs or args, inplace=True)
    found = gates(gated)
    for record in symmetries:
        _check(record, found)
    with torch.no_grad():
        for record in symmetries:
            if record.kind == "parallel":
                merge_parallel(gated, record, found[record.site])
            else:
                for c, slope, intercept in zip(record.channels, record.slopes, record.intercepts, strict=True):
                    _replace(found[record.site], c, slope, intercept)
            for site, c, constant in record.requires:
                _replace(found[site], c, 0.0, constant)
    return collapse(gated, when=when)


def _check(record: Symmetry, found: dict[str, ChannelGate]) -> None:
    remedy = "Pass records that hidden_symmetries found in this model."
    for site, channels in ((record.site, record.channels), *((s, (c,)) for s, c, _ in record.requires)):
        if site not in found:
            raise UsageError(site, "is named by a symmetry, but is no gated site of the model", remedy)
        if channels and max(channels) >= found[site].channels:
            raise UsageError(site, f"has {found[site].channels} channels, a symmetry names {max(channels)}", remedy)


def _replace(gate: ChannelGate, channel: int, slope: float, intercept: float) -> None:
    gate.slope[channel], gate.intercept[channel] = slope, intercept
    gate.alpha[channel], gate.frozen[channel] = 1, True


def merge_parallel(model: nn.Module, record: Symmetry, gate: ChannelGate) -> None:
    """Give the weights of parallel channels to the first one, and drop them; in place."""
    site = gate.site
    columns = _columns(model, site) if site is not None else None
    if columns is None:
        _log.info("%s: parallel channels stay, since what reads them cannot be changed.", record.site)
        return
    first = record.channels[0]
    for c, scale in zip(record.channels[1:], record.scales[1:], strict=True):
        for column in columns:
            column[:, first] += scale * column[:, c]
        _replace(gate, c, 0.0, 0.0)


def _columns(model: nn.Module, site: Site) -> list[Tensor] | None:
    """The weights of all consumers of a site as (O, C, ...), views of parameters; None if they cannot be changed."""
    if site.reason is not None or site.consumer_folds or not site.consumers or site.gated_unit or site.bent:
        return None
    held = [weight_of(model, port) for port in site.consumers]
    found = [weight for weight in held if weight is not None and weight.shape[1] == site.channels]
    return found if len(found) == len(held) else None


def weight_of(model: nn.Module, port: Port) -> Tensor | None:
    """The weight of a plain, ungrouped map as (outputs, inputs, *k), a view of its parameter; else None."""
    module: Any = model.get_submodule(port.module)
    weight = module._parameters.get("weight")
    plain = has_own_forward(module) or port.transposed
    if not isinstance(weight, nn.Parameter) or not plain or int(getattr(module, "groups", 1)) != 1:
        return None
    return weight.detach().t() if port.transposed else weight.detach()
