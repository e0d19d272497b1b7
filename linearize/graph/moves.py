"""Rules of the channel table for operations that move values: views, permutations, slices, padding, concatenations."""

from __future__ import annotations

import math
from typing import Any

from torch import fx

from linearize.graph.capture import shape
from linearize.graph.motion import SPLITS, Motion, argument, axes_of, broadcast_axis, rule, wrap
from linearize.graph.ops import IDENTITY_OPS, op_name


@rule(*IDENTITY_OPS)
def _identity(node: fx.Node, source: fx.Node, axis: int, before: tuple[int, ...], after: tuple[int, ...]) -> Motion:
    if op_name(node).endswith("dropout") and argument(node, "train") is True:
        return Motion(axis, "dropout is active even in eval mode")
    if not node.meta["val"].is_floating_point():
        return Motion(axis, f"it is cast to {node.meta['val'].dtype}")
    return Motion(axis)


@rule("permute")
def _permute(node: fx.Node, source: fx.Node, axis: int, before: tuple[int, ...], after: tuple[int, ...]) -> Motion:
    return Motion(axes_of(argument(node, "dims"), len(before)).index(axis))


@rule("transpose", "t")
def _transpose(node: fx.Node, source: fx.Node, axis: int, before: tuple[int, ...], after: tuple[int, ...]) -> Motion:
    rank = len(before)
    if rank < 2:
        return Motion(axis)
    a, b = (wrap(argument(node, f"dim{i}", argument(node, f"axis{i}", i)), rank) for i in (0, 1))
    return Motion({a: b, b: a}.get(axis, axis))


@rule("movedim")
def _movedim(node: fx.Node, source: fx.Node, axis: int, before: tuple[int, ...], after: tuple[int, ...]) -> Motion:
    starts, ends = (axes_of(node.args[i], len(before)) for i in (1, 2))
    order = [a for a in range(len(before)) if a not in starts]
    for start, end in sorted(zip(starts, ends, strict=True), key=lambda pair: pair[1]):
        order.insert(end, start)
    return Motion(order.index(axis))


@rule("view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "_unsafe_view", "view_as", "reshape_as")
def _reshape(node: fx.Node, source: fx.Node, axis: int, before: tuple[int, ...], after: tuple[int, ...]) -> Motion:
    """The channels stay one axis if an axis of the same size has as many values in front of it and behind it."""
    front, size = math.prod(before[:axis]), before[axis]
    if node.meta["val"].dtype != source.meta["val"].dtype:
        return Motion(None, f"{op_name(node)} reads the bits as another type")
    if size == 1:  # the sizes cannot tell one axis of size 1 from another
        from_end = len(after) - len(before) + axis
        alone = from_end == axis or after[from_end:] != before[axis:]
        if after[: axis + 1] == before[: axis + 1] and alone:
            return Motion(axis)
        return Motion(None, f"{op_name(node)} on a single channel")
    fits = [a for a, n in enumerate(after) if n == size and math.prod(after[:a]) == front]
    if fits:
        return Motion(fits[0])
    return Motion(None, f"{op_name(node)} from {list(before)} to {list(after)} mixes channels with positions")


@rule("expand", "expand_as", "broadcast_to", "repeat", "tile")
def _expand(node: fx.Node, source: fx.Node, axis: int, before: tuple[int, ...], after: tuple[int, ...]) -> Motion:
    kept = broadcast_axis(before, after, axis)
    return Motion(kept, None if kept is not None else f"{op_name(node)} repeats the channels")


@rule("slice", "narrow")
def _slice(node: fx.Node, source: fx.Node, axis: int, before: tuple[int, ...], after: tuple[int, ...]) -> Motion:
    if wrap(argument(node, "dim", 0), len(before)) != axis:
        return Motion(axis)
    if argument(node, "step", 1) != 1:
        return Motion(axis, f"{op_name(node)} takes every other channel")
    start = max(0, wrap(argument(node, "start", 0) or 0, before[axis]))
    return Motion(axis, rows=(start, start + after[axis]))


@rule("select")
def _select(node: fx.Node, source: fx.Node, axis: int, before: tuple[int, ...], after: tuple[int, ...]) -> Motion:
    dim = wrap(argument(node, "dim"), len(before))
    if dim == axis:
        return Motion(None, "select takes a single channel")
    return Motion(axis - (dim < axis))


def part_of(node: fx.Node, axis: int) -> Motion:
    """The channels in one of the tensors that a split returns."""
    source, index = node.args[0], node.args[1]
    if not isinstance(source, fx.Node) or not isinstance(index, int) or not isinstance(source.args[0], fx.Node):
        return Motion(None, "a part of the output of an op that is not in the channel table")
    name, whole, part = op_name(source), shape(source.args[0]), shape(node)
    dim = argument(source, "dim", 0)
    if whole is None or part is None or name not in SPLITS:
        return Motion(None, f"a part of the output of {name}")
    dim = wrap(dim, len(whole))
    if name == "unbind":
        return Motion(None, "unbind takes a single channel") if dim == axis else Motion(axis - (dim < axis))
    if dim != axis:
        return Motion(axis)
    values = source.meta.get("val")
    start = sum(int(value.shape[dim]) for value in list(values or [])[:index])
    return Motion(axis, rows=(start, start + part[axis]))


@rule("constant_pad_nd", "pad")
def _pad(node: fx.Node, source: fx.Node, axis: int, before: tuple[int, ...], after: tuple[int, ...]) -> Motion:
    amounts: Any = argument(node, "pad")
    behind = 2 * (len(before) - 1 - axis)  # amounts are listed from the last axis to the first, two for each
    if any(amounts[behind : behind + 2]):
        return Motion(None, "padding adds channels")
    mode, value = (
        argument(node, "mode", "constant"),
        argument(node, "value"),
    )
    if not any(amounts) or (op_name(node) == "pad" and mode != "constant"):
        return Motion(axis)
    if isinstance(value, (int, float)) and value != 0:
        return Motion(axis, f"it is padded with {value}")
    return Motion(axis, steady=False)


@rule(
    "roll",
    "flip",
    "index_select",
    *(f"{kind}_pad{n}d" for kind in ("reflection", "replication") for n in (1, 2, 3)),
    "cumsum",
)
def _positions(node: fx.Node, source: fx.Node, axis: int, before: tuple[int, ...], after: tuple[int, ...]) -> Motion:
    """Linear on every channel alike as long as they work on other axes."""
    name = op_name(node)
    dims = argument(node, "dims", argument(node, "dim"))
    moved_axes = [] if "_pad" in name else axes_of(dims, len(before))
    if axis in moved_axes or before[axis] != after[axis]:
        return Motion(axis if before == after else None, f"{name} reorders the channels")
    return Motion(axis, steady=name != "cumsum")


@rule("cat", "stack")
def _cat(node: fx.Node, source: fx.Node, axis: int, before: tuple[int, ...], after: tuple[int, ...]) -> Motion:
    dim = wrap(argument(node, "dim", 0), len(after))
    if op_name(node) == "stack":
        return Motion(axis + (dim <= axis), "it is stacked with other tensors")
    return Motion(axis, "it is concatenated with other channels" if dim == axis else "it is joined by other positions")
