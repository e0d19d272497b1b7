"""What an operation does to the channels of an operand, and the table with one rule per operation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import fx

from linearize.graph.capture import shape
from linearize.graph.ops import op_name

CONVOLUTIONS = {f"{name}{n}d": n for name in ("conv", "conv_transpose") for n in (1, 2, 3)}


@dataclass(frozen=True)
class Motion:
    """What an op does to the channels of one operand.

    Attributes:
        axis: where the channels are in the result, counted from the front; None if they are lost.
        reason: why linear channels cannot be followed through it; None if it is linear and treats all channels alike.
        steady: a value that is constant over positions stays that constant (not so with zero padding or scaling).
        fold: True if the op is a constant affine map per channel: it can be folded into a linear map beside it.
        uniform: True if it multiplies all channels by the same number: it can as well stay where it is.
        each: True for what `reason` speaks of, if it treats every channel by itself, and all alike: a maximum over
            positions. Channels can be put in another order in front of it, and left out, but not merged.
        rows: the part of the channels that is kept, if the op takes a slice of them.
    """

    axis: int | None
    reason: str | None = None
    steady: bool = True
    fold: bool = False
    uniform: bool = False
    each: bool = False
    rows: tuple[int, int] | None = None


SPLITS = ("chunk", "split", "split_with_sizes", "tensor_split", "unbind", "unsafe_split")


Rule = Callable[[fx.Node, fx.Node, int, tuple[int, ...], tuple[int, ...]], Motion]


RULES: dict[str, Rule] = {}
"""The channel table: one rule for each ATen op, by its name."""


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Put a function into the table, as the rule of these ops.

    Examples:
        >>> rule("relu")(lambda node, source, axis, before, after: Motion(axis, "bends")) is RULES.pop("relu")
        True
    """

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return register


def argument(node: fx.Node, name: str, default: Any = None) -> Any:
    """An argument of an ATen op by the name that its schema gives it, or the schema's default.

    Args:
        node: a call of the op.
        name: of the argument.
        default: for an op that has no argument of this name.

    Examples:
        >>> import torch
        >>> graph = torch.fx.Graph()
        >>> node = graph.call_function(torch.ops.aten.softmax.int, (graph.placeholder("x"), -1))
        >>> argument(node, "dim"), argument(node, "dtype"), argument(node, "eps", 0.1)
        (-1, None, 0.1)
    """
    for index, entry in enumerate(node.target._schema.arguments):  # type: ignore[union-attr]
        if entry.name == name:
            return node.args[index] if len(node.args) > index else node.kwargs.get(name, entry.default_value)
    return default


def wrap(axis: int, rank: int) -> int:
    """An axis counted from the front.

    Examples:
        >>> wrap(-1, 4), wrap(1, 4)
        (3, 1)
    """
    return axis + rank if axis < 0 else axis


def axes_of(value: Any, rank: int) -> list[int]:
    """The axes that an argument `dim` names, from the front; all of them for None or an empty list.

    Examples:
        >>> axes_of([0, -1], 3), axes_of(None, 2)
        ([0, 2], [0, 1])
    """
    if value is None or value == []:
        return list(range(rank))
    return [wrap(a, rank) for a in (value if isinstance(value, (list, tuple)) else [value])]


def broadcast_axis(before: tuple[int, ...], after: tuple[int, ...], axis: int) -> int | None:
    """The axis of one operand in the broadcast result; None if it is stretched or not there.

    Examples:
        >>> broadcast_axis((3, 4), (2, 3, 4), 1), broadcast_axis((1, 4), (3, 4), 0)
        (2, None)
    """
    moved = axis + len(after) - len(before)
    return moved if moved >= 0 and after[moved] == before[axis] else None


def produced_axis(node: fx.Node) -> int | None:
    """The channel axis that an operation itself defines: linear maps, convolutions, norms, embeddings."""
    sizes = shape(node)
    if sizes is None or not sizes:
        return None
    name = op_name(node)
    if name in ("linear", "addmm", "layer_norm", "embedding", "rms_norm", "_fused_rms_norm"):
        return len(sizes) - 1
    if name in ("mm", "matmul", "bmm", "baddbmm") and len(sizes) > 1:
        return len(sizes) - 1
    if name in CONVOLUTIONS:
        return len(sizes) - 1 - CONVOLUTIONS[name]
    if name in ("batch_norm", "group_norm", "instance_norm") and len(sizes) > 1:
        return 1
    return None
