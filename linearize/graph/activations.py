"""Find the activations in a captured graph: elementwise nonlinear modules, and direct function calls."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import fx, nn

from linearize.graph.capture import CONSTANT, Capture, shape, users
from linearize.graph.ops import ACTIVATIONS, ARITHMETIC, is_constant, op_name
from linearize.graph.stacks import Call

# What may stand inside an activation module besides arithmetic: it moves no value.
_CASTS = frozenset(("to _to_copy clone contiguous alias detach type_as lift_fresh empty_like expand_as").split())
_BENDING = ACTIVATIONS | frozenset(
    (
        "exp erf sqrt rsqrt pow square abs sin cos log log1p expm1 reciprocal clamp clamp_min clamp_max clip "
        "sign maximum minimum where float_power tan atan asinh"
    ).split()
)


@dataclass(frozen=True)
class Activation:
    """One evaluation of an activation in the graph.

    Attributes:
        name: class of the activation module in lower case, or the ATen op.
        source, output: the node it reads and the node that holds its result.
        nodes: the ops it is made of.
        call: the module call that is the activation; None for a bare function call.
        owner: the module call whose forward makes it.
    """

    name: str
    source: fx.Node
    output: fx.Node
    nodes: tuple[fx.Node, ...]
    call: Call | None
    owner: Call


def find_activations(model: nn.Module, captured: Capture) -> list[Activation]:
    """Every elementwise nonlinear activation of the graph, in order of execution.

    A module whose ops, and those of its children, are all elementwise over its one input is one activation, however
    many ops it has. Any other activation op stands for itself.
    """
    found: list[Activation] = []
    inside: set[fx.Node] = set()
    below = _below(captured)
    for call in sorted(captured.ops, key=lambda call: call.path.count(".")):  # the outermost module wins
        ops = below[call]
        if ops[0] in inside:
            continue
        module_activation = _module_activation(model, captured, call, ops)
        if module_activation is not None:
            found.append(module_activation)
            inside.update(ops)
    for node in captured.calls:
        if node in inside or op_name(node) not in ACTIVATIONS or not isinstance(node.args[0], fx.Node):
            continue
        if CONSTANT in node.args[0].meta or shape(node) is None:
            continue
        found.append(Activation(op_name(node), node.args[0], node, (node,), None, captured.calls[node]))
    return sorted(found, key=lambda activation: captured.order[activation.output])


def _module_activation(model: nn.Module, captured: Capture, call: Call, ops: list[fx.Node]) -> Activation | None:
    if not call.path or len(captured.stacks[ops[0]]) < 2:
        return None
    names = [op_name(node) for node in ops]
    if not all(name in ACTIVATIONS or name in ARITHMETIC or name in _CASTS for name in names):
        return None
    module = model.get_submodule(call.path)
    members = set(ops)
    if len({captured.calls[node] for node in ops}) > 1 and any(_differs(node) for node in captured.ops[call]):
        return None  # a constant map per channel, and the activation is a child
    outside = {
        source
        for node in ops
        for source in node.all_input_nodes
        if source not in members and CONSTANT not in source.meta
    }
    results = [node for node in ops if any(user not in members for user in users(node))]
    bent = {op_name(node) for node in ops if CONSTANT not in node.meta} & _BENDING
    if len(outside) != 1 or len(results) != 1 or not (bent or _squares(ops)):
        return None
    source, output = outside.pop(), results[0]
    if shape(source) is None or shape(source) != shape(output):
        return None
    return Activation(type(module).__name__.lower(), source, output, tuple(ops), call, captured.stacks[ops[0]][-2])


def _differs(node: fx.Node) -> bool:
    """True if an op works with a constant that is not one number for all."""
    constants = [source for source in node.all_input_nodes if CONSTANT in source.meta]
    return CONSTANT not in node.meta and any(math.prod(shape(source) or ()) > 1 for source in constants)


def _below(captured: Capture) -> dict[Call, list[fx.Node]]:
    """The ops of every module call: its own, and those of the modules that it calls."""
    found: dict[Call, list[fx.Node]] = {}
    for node, stack in captured.stacks.items():
        for call in stack:
            found.setdefault(call, []).append(node)
    return found


def _squares(ops: list[fx.Node]) -> bool:
    """X * x is nonlinear although no op in it is."""
    return any(
        op_name(node) in ("mul", "div")
        and all(isinstance(value, fx.Node) and not is_constant(value) for value in node.args[:2])
        for node in ops
    )
