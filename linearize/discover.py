"""From a captured graph to the list of sites: every activation, with what can be done about it or why not."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

from torch import fx, nn

from linearize.activations import Activation, find_activations
from linearize.capture import Capture, Inputs, capture, shape, users
from linearize.channels import channel_axes, constant, op_name
from linearize.sites import Port, Site
from linearize.walk import Dead, Reading, Walker

_SQUASHING = frozenset({"sigmoid", "hardsigmoid", "tanh", "softplus"})


def discover(model: nn.Module, inputs: Inputs) -> tuple[Site, ...]:
    """All activation sites of a model, in order of execution.

    Raises:
        CaptureError: the model cannot be captured on these inputs.
    """
    captured = capture(model, inputs)
    axes = channel_axes(captured.graph)
    walker = Walker(model, captured, shared_parameters(model, captured))
    activations = find_activations(model, captured)
    calls = Counter((a.owner, _base(a)) for a in activations)
    seen: Counter[tuple[Any, str]] = Counter()
    sites: dict[str, Site] = {}
    for order, activation in enumerate(activations):
        key = (activation.owner, _base(activation))
        site = _locate(model, activation, seen[key], calls[key])
        seen[key] += 1
        if site.name in sites:
            first = sites[site.name]
            if first.reason is None or not first.reason.startswith("it runs"):
                sites[site.name] = replace(first, reason="it runs more than once with the same weights")
            continue
        site = replace(site, order=order)
        sites[site.name] = _describe(walker, activation, site, axes)
    return tuple(sites.values())


def shared_parameters(model: nn.Module, captured: Capture) -> dict[str, str]:
    """Name of each parameter or buffer that something else uses too, with the name of the other use."""
    holders: dict[int, list[str]] = {}
    for name, tensor in [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]:
        storage = tensor.data_ptr() if tensor.device.type != "meta" and tensor.numel() else 0
        holders.setdefault(storage or id(tensor), []).append(name)
    shared = {name: names[names[0] == name] for names in holders.values() if len(names) > 1 for name in names}
    for node, name in captured.parameters.items():
        readers = {captured.calls.get(user) for user in users(node)}
        if len(readers) > 1 and name not in shared:
            places = {call.path for call in readers if call is not None}
            shared[name] = "another use in " + (max(places, default="") or "the model itself")
    return shared


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
    return Site(name, owner, call=index, target=activation.name, function=function, options=options, **channels_axis)


def _function(node: fx.Node) -> tuple[str, tuple[tuple[str, Any], ...]]:
    """The out-of-place ATen op of an activation call, and its arguments besides the input, by name."""
    schema = node.target._schema  # type: ignore[union-attr]
    names = [argument.name for argument in schema.arguments]
    given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    return op_name(node), tuple((name, value) for name, value in given.items() if name != names[0])


def _describe(walker: Walker, activation: Activation, site: Site, axes: dict[fx.Node, int]) -> Site:
    sizes = shape(activation.output) or ()
    axis = axes.get(activation.source)
    if axis is None or axis >= len(sizes):
        return replace(site, ungated="no linear map, convolution or norm before it defines a channel axis")
    total = 1
    for size in sizes:
        total *= size
    site = replace(site, channels=sizes[axis], axis=axis - len(sizes), positions=total // max(1, sizes[axis]))
    if activation.call is not None and _per_channel(walker.model.get_submodule(activation.call.path)):
        site = replace(site, reason="the activation has parameters of its own for each channel")
    overwritten = _read_after_write(walker.captured, activation)
    if overwritten is not None:
        return replace(site, ungated=f"it works in place, and what it overwrites is read again by {overwritten}")
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
        if uses.folds and len(uses.ports) > 1:
            raise Dead("a constant map per channel lies before one of several consumers")
    except Dead as dead:
        return replace(site, reason=site.reason or str(dead))
    site = replace(
        site,
        producer=before.port,
        consumers=tuple(uses.ports),
        folds=before.folds,
        consumer_folds=tuple(uses.folds),
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
        _check_packing(gate, up)
        uses = walker.forward(product, axis)
        if uses.folds and len(uses.ports) > 1:
            raise Dead("a constant map per channel lies before one of several consumers")
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


def _check_packing(gate: Reading, up: Reading) -> None:
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
    if _leaves(gate.node) != 2:
        raise Dead(f"what {a.module} puts out is also read elsewhere")


def _leaves(node: fx.Node) -> int:
    """How many slices of a node's value are read."""
    return sum(
        _leaves(user)
        if op_name(user) in ("chunk", "split", "split_with_sizes", "view", "reshape")
        else len(users(user))
        for user in users(node)
    )


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
    if len(others) != 1 or not isinstance(others[0], fx.Node) or constant(others[0]) is not None:
        return None
    return readers[0], others[0]


def _only_reader(activation: Activation) -> None:
    others = [user for user in users(activation.source) if user not in activation.nodes]
    if others:
        raise Dead(f"what it reads is also read by {op_name(others[0])}")


def _read_after_write(captured: Capture, activation: Activation) -> str | None:
    """The op that reads an in-place activation's input after it was overwritten, through views too."""
    if not activation.inplace:
        return None
    node: Any = activation.source
    while isinstance(node, fx.Node) and node.op == "call_function":
        late = [
            u
            for u in users(node)
            if u not in activation.nodes and captured.order[u] > captured.order[activation.nodes[0]]
        ]
        if late:
            return f"{op_name(late[0])} in {captured.path(late[0]) or 'the model itself'}"
        if op_name(node) not in (
            "view",
            "reshape",
            "permute",
            "transpose",
            "getitem",
            "chunk",
            "split",
            "slice",
            "flatten",
        ):
            return None
        node = node.args[0]
    return None


def _saved(model: nn.Module, site: Site) -> float:
    """Multiply-adds that one channel costs in its producers and consumers."""

    def per_channel(port: Port) -> float:
        weight = getattr(model.get_submodule(port.module), "weight", None)
        return 0.0 if weight is None else port.positions * weight.numel() / port.total

    producers = [port for port in (site.producer, site.up) if port is not None]
    return sum(per_channel(port) for port in (*producers, *site.consumers))


__all__ = ["discover", "shared_parameters"]
