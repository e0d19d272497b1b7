"""From a captured graph to the list of sites: every activation, with what can be done about it or why not."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from typing import Any

from torch import Tensor, fx, nn

from linearize.graph.activations import Activation, find_activations
from linearize.graph.capture import CONSTANT, Capture, Inputs, capture, shape, users
from linearize.graph.channels import channel_axes, understood
from linearize.graph.held import standing_in
from linearize.graph.memory import overwrites, overwritten, stale_reader
from linearize.graph.opaque import OPAQUE
from linearize.graph.ops import is_constant, op_name
from linearize.graph.problem import Dead
from linearize.graph.walk import Reading, Walker
from linearize.sites.site import Port, Site
from linearize.tensors import QUANTISE_LATER, has_memory, held

_PLAIN = (type(None), bool, int, float, str)  # what a record may hold: no nodes of a graph
_SQUASHING = frozenset({"sigmoid", "hardsigmoid", "tanh", "softplus"})


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
        site = _describe(walker, activation, replace(site, order=order), axes)
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


def shared_parameters(model: nn.Module, captured: Capture) -> dict[str, str]:
    """Name of each parameter or buffer that something else uses too, with the name of the other use."""
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    shared = {name: names[names[0] == name] for names in _overlapping(tensors) if len(names) > 1 for name in names}
    for node, name in captured.parameters.items():
        readers = {captured.calls.get(user) for user in users(node)}
        if len(readers) > 1 and name not in shared:
            places = {call.path for call in readers if call is not None}
            shared[name] = "another use in " + (max(places, default="") or "the model itself")
    return shared


def _overlapping(tensors: list[tuple[str, Tensor]]) -> list[list[str]]:
    """Names of tensors grouped by common memory, where only a part is common, too."""
    spans: list[tuple[str, int, int, str]] = []
    for name, tensor in tensors:
        if tensor.device.type == "meta" or not tensor.numel() or not has_memory(tensor):
            spans.append(("object", id(tensor), id(tensor) + 1, name))
            continue
        last = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
        start = tensor.data_ptr()
        spans.append((str(tensor.device), start, start + (last + 1) * tensor.element_size(), name))
    groups: list[list[str]] = []
    where, end = "", 0
    for device, start, stop, name in sorted(spans, key=lambda span: span[:2]):
        if device != where or start >= end:
            groups.append([])
            where, end = device, stop
        groups[-1].append(name)
        end = max(end, stop)
    return groups


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


def _no_axis(captured: Capture, activation: Activation) -> str:
    """Why the channels of an activation are not known: nothing defines them, or an op before it is not understood."""
    found = "no linear map, convolution or norm before it defines a channel axis"
    node = activation.source
    while node.op == "call_function" and understood(node) and node.all_input_nodes:
        node = node.all_input_nodes[0]
    if node.op != "call_function" or understood(node):
        return found
    if op_name(node) == OPAQUE:
        return f"{captured.path(node)} is quantised, or holds packed weights: {QUANTISE_LATER}"
    return (
        f"{found}: what {op_name(node)} does with channels is not known ({captured.path(node) or 'the model itself'})"
    )


def _describe(walker: Walker, activation: Activation, site: Site, axes: dict[fx.Node, int]) -> Site:
    if site.ungated is not None:
        return site
    sizes = shape(activation.output) or ()
    axis = axes.get(activation.source)
    if axis is None or axis >= len(sizes):
        return replace(site, ungated=_no_axis(walker.captured, activation))
    total = 1
    for size in sizes:
        total *= size
    site = replace(site, channels=sizes[axis], axis=axis - len(sizes), positions=total // max(1, sizes[axis]))
    if activation.call is not None and _per_channel(walker.model.get_submodule(activation.call.path)):
        site = replace(site, reason="the activation has parameters of its own for each channel")
    stale = stale_reader(walker.captured, activation)
    if stale is not None:
        where = walker.captured.path(stale) or "the model itself"
        found = f"it works in place, and what it overwrites is read again by {op_name(stale)} in {where}"
        return replace(site, ungated=found)
    if site.function is None and not _can_work_out_of_place(walker, activation):
        return replace(site, ungated="it overwrites its input, and has no attribute inplace to change that")
    if _differs_by_channel(activation, axis):
        site = replace(site, reason="the activation has parameters of its own per channel")
    product = _product(activation.output)
    if product is None:
        return _plain(walker, activation, site, axis)
    return _gated_unit(walker, activation, site, axis, *product)


def _per_channel(module: nn.Module) -> bool:
    return any(tensor.numel() > 1 for tensor in (*module.parameters(), *module.buffers()))


def _plain(walker: Walker, activation: Activation, site: Site, axis: int) -> Site:
    if site.reason is not None:
        return site
    try:
        _only_reader(activation)
        before = walker.back(activation.source, axis)
        uses = walker.forward(activation.output, axis)
        written = overwritten(walker.captured, before.node, uses.nodes)
        if written is not None:
            raise Dead(f"the input of its producer is overwritten by {op_name(written)}")
    except Dead as dead:
        return replace(site, reason=site.reason or str(dead))
    site = replace(
        site,
        producer=before.port,
        consumers=tuple(uses.ports),
        folds=before.folds,
        consumer_folds=tuple(uses.folds),
        parts=uses.parts,
        bent=uses.bent,
        steady=uses.steady,
        direct=before.direct and uses.direct,
    )
    return replace(site, saved=_saved(walker.model, site))


def _gated_unit(
    walker: Walker, activation: Activation, site: Site, axis: int, product: fx.Node, factor: fx.Node
) -> Site:
    """act(g) * u: the activation scales another tensor of the same shape."""
    if shape(factor) != shape(activation.output):
        return replace(site, ungated="it is a gate that scales another tensor, as in squeeze-and-excite")
    site = replace(site, gated_unit=True)
    try:
        _only_reader(activation)
        if len(users(factor)) > 1:
            raise Dead("the other factor of its product is read elsewhere")
        gate = walker.back(activation.source, axis, packed=True)
        up = walker.back(factor, axis, packed=True)
        _check_packing(gate, up, (activation.source, factor))
        uses = walker.forward(product, axis)
        if uses.parts > 1 or uses.bent:
            found = "a slice of the channels" if uses.parts > 1 else "a maximum over positions"
            raise Dead(f"after the activation, {found} is taken")
    except Dead as dead:
        if activation.name in _SQUASHING:
            return replace(site, ungated="it is a gate that scales another tensor", reason=None)
        return replace(site, reason=f"gated unit: {dead}")
    site = replace(
        site,
        producer=gate.port,
        up=up.port,
        consumers=tuple(uses.ports),
        folds=gate.folds,
        up_folds=up.folds,
        consumer_folds=tuple(uses.folds),
        steady=uses.steady,
        direct=gate.direct and up.direct and uses.direct,
    )
    return replace(site, saved=_saved(walker.model, site))


def _check_packing(gate: Reading, up: Reading, ends: tuple[fx.Node, fx.Node]) -> None:
    """Two halves of one map must be the whole of it; two maps must be read whole."""
    a, b = gate.port, up.port
    if a.module != b.module:
        if a.stop - a.start != a.total or b.stop - b.start != b.total:
            raise Dead("it uses a slice of a map that has other uses")
        return
    if (
        {a.start, b.start} != {0, a.stop - a.start}
        or a.total != 2 * (a.stop - a.start)
        or b.stop - b.start != a.stop - a.start
    ):
        raise Dead(f"gate and factor are not the two halves of {a.module}")
    visited = {*gate.visited, *up.visited}
    if any(user not in visited for node in visited if node not in ends for user in users(node)):
        raise Dead(f"what {a.module} puts out is also read elsewhere")


def _product(output: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """The product and its other factor, if all that is done with an activation is to multiply another tensor by it."""
    node = output
    while len(users(node)) == 1 and op_name(users(node)[0]) in (
        "dropout",
        "contiguous",
        "to",
        "expand",
        "view",
        "unsqueeze",
        "clone",
    ):
        node = users(node)[0]
    readers = users(node)
    if len(readers) != 1 or op_name(readers[0]) != "mul":
        return None
    others = [value for value in readers[0].args[:2] if value is not node]
    if len(others) != 1 or not isinstance(others[0], fx.Node) or is_constant(others[0]):
        return None
    return readers[0], others[0]


def _only_reader(activation: Activation) -> None:
    others = [user for user in users(activation.source) if user not in activation.nodes]
    if others:
        raise Dead(f"what it reads is also read by {op_name(others[0])}")


def _can_work_out_of_place(walker: Walker, activation: Activation) -> bool:
    """True if an activation module leaves its input alone, or can be told to."""
    if activation.call is None or not overwrites(activation):
        return True
    return any(getattr(m, "inplace", False) is True for m in walker.model.get_submodule(activation.call.path).modules())


def _differs_by_channel(activation: Activation, axis: int) -> bool:
    """True if a constant inside the activation is not the same for all channels."""
    for node in activation.nodes:
        for source in node.all_input_nodes:
            sizes, rank = shape(source), len(shape(node) or ())
            if CONSTANT in node.meta or CONSTANT not in source.meta or sizes is None:
                continue
            aligned = axis - (rank - len(sizes))
            if math.prod(sizes) > 1 and (op_name(node) == "prelu" or (aligned >= 0 and sizes[aligned] > 1)):
                return True
    return False


def _saved(model: nn.Module, site: Site) -> float:
    """Multiply-adds that one channel costs in its producers and consumers."""

    def per_channel(port: Port) -> float:
        weight = held(model.get_submodule(port.module), "weight")
        return 0.0 if weight is None else port.positions * weight.numel() / port.total

    producers = [port for port in (site.producer, site.up) if port is not None]
    return sum(per_channel(port) for port in (*producers, *site.consumers))


__all__ = ["discover", "shared_parameters"]
