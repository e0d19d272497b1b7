"""Which values of a captured graph share memory, and which operations read or write it, in order."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, fx

from linearize.graph.activations import Activation
from linearize.graph.capture import Capture, is_check
from linearize.graph.ops import is_inplace


def storage_of(tensor: Tensor) -> int:
    """An identifier of a tensor's memory. Views of one tensor have the same."""
    try:
        return int(tensor.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):  # a tensor without memory, such as a sparse one
        return -id(tensor)


def memory_of(node: fx.Node) -> int | None:
    """An identifier of the memory of a node's value."""
    value = node.meta.get("val")
    return storage_of(value) if isinstance(value, Tensor) else None


def overwrites(activation: Activation) -> bool:
    """True if an activation writes into the memory of its input."""
    mine = memory_of(activation.source)
    return any(is_inplace(node) and memory_of(node) == mine for node in activation.nodes)


def stale_reader(captured: Capture, activation: Activation) -> fx.Node | None:
    """The first operation that reads, under an older name, memory that an in-place activation has overwritten.

    Such an op would see another value if the activation did not work in place.
    """
    mine = memory_of(activation.source)
    written = [node for node in activation.nodes if is_inplace(node) and memory_of(node) == mine]
    if not written:
        return None
    start = captured.order[written[0]]
    fresh = set(activation.nodes)
    nodes: list[fx.Node] = list(captured.graph.nodes)
    for node in nodes:
        if captured.order[node] <= start or node in fresh or is_check(node):
            continue
        read = [source for source in node.all_input_nodes if memory_of(source) == mine]
        if any(source not in fresh for source in read):
            return node
        if read:
            fresh.add(node)  # a view of the result, or computed from it: read under its new name
    return None


def overwritten(captured: Capture, reader: fx.Node, until: Iterable[fx.Node]) -> fx.Node | None:
    """The first op that writes into what `reader` has read, before the last op of `until` runs."""
    held = {memory_of(source) for source in reader.all_input_nodes} - {None}
    end = max((captured.order[node] for node in until), default=0)
    nodes: list[fx.Node] = list(captured.graph.nodes)
    for node in nodes:
        if captured.order[reader] < captured.order[node] < end and is_inplace(node):
            target = node.args[0]
            if isinstance(target, fx.Node) and memory_of(target) in held:
                return node
    return None
