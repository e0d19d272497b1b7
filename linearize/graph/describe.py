"""Describe one activation: the linear maps around it, or the reason why they cannot be found."""

from __future__ import annotations

import math
from dataclasses import replace

from torch import fx, nn

from linearize.graph.activations import Activation
from linearize.graph.capture import CONSTANT, Capture, shape, users
from linearize.graph.channels import understood
from linearize.graph.memory import overwrites, overwritten, stale_reader
from linearize.graph.opaque import OPAQUE
from linearize.graph.ops import is_constant, op_name
from linearize.graph.problem import Dead
from linearize.graph.walk import Trail, Walker
from linearize.sites.site import Port, Site
from linearize.tensors import QUANTISE_LATER, held

_SQUASHING = frozenset({"sigmoid", "hardsigmoid", "tanh", "softplus"})


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


def describe(walker: Walker, activation: Activation, site: Site, axes: dict[fx.Node, int]) -> Site:
    """A site with the maps around it, or with the reason why it gets no gate or cannot be collapsed."""
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


def _check_packing(gate: Trail, up: Trail, ends: tuple[fx.Node, fx.Node]) -> None:
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
