"""What an ATen operation is: its name, its kind, whether it writes in place, and which values are constant."""

from __future__ import annotations

from typing import Any

from torch import fx

from linearize.graph.capture import CONSTANT

# Elementwise and nonlinear: what a network's author would call an activation.
ACTIVATIONS = frozenset(
    (
        "relu relu6 hardtanh leaky_relu rrelu prelu elu selu celu gelu silu mish hardswish hardsigmoid "
        "hardshrink softshrink sigmoid tanh softplus softsign log_sigmoid threshold"
    ).split()
)
# Elementwise too, but alone they are arithmetic (norms, positions, scores); inside an activation module they count.
ARITHMETIC = frozenset(
    (
        "exp erf sqrt rsqrt pow square abs sin cos log log1p expm1 reciprocal clamp clamp_min clamp_max clip "
        "sign neg maximum minimum where add sub rsub mul div relu relu6 float_power tan atan asinh sgn gt lt "
        "ge le eq ne scalar_tensor full_like zeros_like ones_like"
    ).split()
)
IDENTITY_OPS = frozenset(
    ("clone contiguous alias detach to _to_copy lift_fresh type_as dropout feature_dropout alpha_dropout").split()
)
RESHAPES = IDENTITY_OPS | frozenset("view reshape flatten unsqueeze squeeze expand".split())
_ALIASES = {
    "multiply": "mul",
    "divide": "div",
    "true_divide": "div",
    "subtract": "sub",
    "negative": "neg",
    "concat": "cat",
    "concatenate": "cat",
    "swapaxes": "transpose",
    "swapdims": "transpose",
    "moveaxis": "movedim",
}


def op_name(node: fx.Node) -> str:
    """Name of an ATen op without its overload and without the underscore of the in-place form: "relu"."""
    packet = getattr(node.target, "overloadpacket", None)
    if packet is None:
        return getattr(node.target, "__name__", str(node.target))
    name = str(packet).removeprefix("aten.")
    name = name if name.startswith("_") else name.rstrip("_")
    return _ALIASES.get(name, name)


def is_inplace(node: fx.Node) -> bool:
    """True if the op writes into its first operand."""
    packet = getattr(node.target, "overloadpacket", None)
    return packet is not None and str(packet).endswith("_") and not str(packet).endswith("__")


def is_constant(node: fx.Node) -> bool:
    """True for parameters and buffers, and for what is computed from them alone."""
    return node.op == "get_attr" or CONSTANT in node.meta


def constant(node: Any) -> fx.Node | None:
    """The parameter or buffer behind a constant operand, through views and casts; None if it is computed, or varies."""
    if not isinstance(node, fx.Node) or not is_constant(node):
        return None
    held: fx.Node = node
    while held.op == "call_function":
        if op_name(held) not in RESHAPES or not isinstance(held.args[0], fx.Node):
            return None
        held = held.args[0]
    return held
