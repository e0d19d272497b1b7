"""From a captured graph to the list of sites: every activation, with what is known about it."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

from torch import fx, nn

from linearize.graph.activations import Activation, find_activations
from linearize.graph.capture import Inputs, capture
from linearize.graph.channels import channel_axes
from linearize.graph.describe import describe
from linearize.graph.held import standing_in
from linearize.graph.ops import op_name
from linearize.graph.overlap import shared_parameters
from linearize.graph.walk import Walker
from linearize.sites.site import Site

_PLAIN = (type(None), bool, int, float, str)  # what a record may hold: no nodes of a graph


def discover(model: nn.Module, inputs: Inputs) -> tuple[Site, ...]:
    """All activation sites of a model, in order of execution.

    Raises:
        CaptureError: the model cannot be captured on these inputs.
    """
    with standing_in(model, inputs):  # in eval mode throughout: weights that are computed may change when read
        return _discover(model, inputs)


def _discover(model: nn.Module, inputs: Inputs) -> tuple[Site, ...]:
    captured = capture(model, inputs)
    axes = channel_axes(captured.graph)
    walker = Walker(model, captured, shared_parameters(model, captured))
    activations = find_activations(model, captured)
    calls = Counter((a.owner, _base(a)) for a in activations)
    known = Counter(a.call.path for a in activations if a.call is not None)
    seen: Counter[tuple[Any, str]] = Counter()
    sites: dict[str, Site] = {}
    for order, activation in enumerate(activations):
        key = (activation.owner, _base(activation))
        site = _locate(model, activation, seen[key], calls[key])
        seen[key] += 1
        site = describe(walker, activation, replace(site, order=order), axes)
        if activation.call is not None and captured.times.get(activation.call.path, 1) > known[activation.call.path]:
            site = replace(site, ungated="it is also called on a constant, or where the capture cannot look")
        sites[site.name] = _again(sites[site.name], site) if site.name in sites else site
    return tuple(sites.values())


def _again(first: Site, second: Site) -> Site:
    """One place in the model that runs twice: it can have one gate, if both runs have the same channels."""
    if (first.channels, first.axis) != (second.channels, second.axis):
        found = f"{first.channels} channels on axis {first.axis}, {second.channels} on axis {second.axis}"
        return replace(first, ungated=first.ungated or second.ungated or f"it is called on different inputs: {found}")
    why = "it runs more than once with the same weights"
    return replace(first, ungated=first.ungated or second.ungated, reason=why)


def _base(activation: Activation) -> str:
    return activation.call.path if activation.call is not None else activation.name


def _locate(model: nn.Module, activation: Activation, index: int, calls: int) -> Site:
    """Name and place of the gate: at the activation module, or inside the forward that calls the activation."""
    channels_axis: dict[str, Any] = {
        "activation": activation.name,
        "channels": 0,
        "axis": -1,
        "order": 0,
        "positions": 0,
    }
    if activation.call is not None and calls == 1:
        return Site(activation.call.path, activation.call.path, **channels_axis)
    owner = activation.owner.path
    base = activation.call.path.rsplit(".", 1)[-1] if activation.call is not None else activation.name
    taken = dict(model.get_submodule(owner).named_children())
    suffix = "" if f"{base}_{index}" not in taken else "_gate"
    name = f"{owner}.{base}_{index}{suffix}" if owner else f"{base}_{index}{suffix}"
    if activation.call is not None:
        return Site(
            name, owner, call=index, target=activation.call.path[len(owner) + 1 if owner else 0 :], **channels_axis
        )
    function, options = _function(activation.output)
    plain = all(isinstance(value, _PLAIN) for _, value in options)
    return Site(
        name,
        owner,
        call=index,
        target=activation.name,
        function=function,
        options=options if plain else (),
        ungated=None if plain else "it is a function of other tensors besides its input",
        **channels_axis,
    )


def _function(node: fx.Node) -> tuple[str, tuple[tuple[str, Any], ...]]:
    """The out-of-place ATen op of an activation call, and its arguments besides the input, by name."""
    schema = node.target._schema  # type: ignore[union-attr]
    names = [argument.name for argument in schema.arguments]
    given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    return op_name(node), tuple((name, value) for name, value in given.items() if name != names[0])
