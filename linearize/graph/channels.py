"""The channel table: how each ATen operation moves, keeps or mixes the channel axis.

There is one rule per operation. Given the axis that holds the channels in an operand, it says where they are in the
result, and what happened to them. An operation that is not in the table is opaque. It is never taken as elementwise.
"""

from __future__ import annotations

from torch import fx

from linearize.graph import computes  # noqa: F401 - puts its rules into the table
from linearize.graph.capture import shape
from linearize.graph.motion import RULES, SPLITS, Motion, broadcast_axis, produced_axis
from linearize.graph.moves import part_of
from linearize.graph.opaque import OPAQUE
from linearize.graph.ops import ACTIVATIONS, ARITHMETIC, op_name
from linearize.tensors import QUANTISE_LATER

# These read any operand's values; every other op reads the first one's, and from others at most shape or type.
_ANY_OPERAND = frozenset(
    (
        "mul div add sub rsub addcmul cat concat stack linear addmm mm matmul bmm baddbmm maximum minimum where "
        "masked_fill conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d"
    ).split()
)


def motion_of(node: fx.Node, source: fx.Node, axis: int) -> Motion:
    """Follow the channels of `source`, held on `axis`, through `node`."""
    before, after = shape(source), shape(node)
    name = op_name(node)
    if name == "getitem":
        return part_of(node, axis)
    if name == OPAQUE:
        return Motion(None, f"there is a quantised or packed layer: {QUANTISE_LATER}")
    if before is None or not 0 <= axis < len(before):
        return Motion(None, f"{name} reads something that is no tensor of fixed shape")
    if name in SPLITS:
        return Motion(axis, None)  # what is kept of it is the getitem's business
    if after is None:
        return Motion(None, f"{name} gives no single tensor of fixed shape")
    known = RULES.get(name)
    if known is not None and name not in _ANY_OPERAND and node.args[0] is not source:
        return Motion(None, f"{name} reads it as something else than its input")
    if known is not None:
        return known(node, source, axis, before, after)
    if name in ACTIVATIONS or name in ARITHMETIC:
        kept = broadcast_axis(before, after, axis)
        return Motion(kept, f"{name} is not linear")
    return Motion(None, f"{name} is not in the channel table")


def understood(node: fx.Node) -> bool:
    """True if the table says what an operation does with channels."""
    name = op_name(node)
    named = name in RULES or name in SPLITS or name in ACTIVATIONS or name in ARITHMETIC
    return named or name == "getitem" or produced_axis(node) is not None


def channel_axes(graph: fx.Graph) -> dict[fx.Node, int]:
    """The channel axis of every node for which it is known: defined by an op, or carried there from one."""
    known: dict[fx.Node, int] = {}
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        axis = produced_axis(node)
        if axis is None:
            moved = (motion_of(node, source, known[source]).axis for source in node.all_input_nodes if source in known)
            axis = next((value for value in moved if value is not None), None)
        if axis is not None:
            known[node] = axis
    return known
