"""Rules of the channel table for operations that compute: pools, sums, scales, norms, maxima, products."""

from __future__ import annotations

import math
from typing import Literal

from torch import fx

from linearize.graph.capture import shape
from linearize.graph.motion import CONVOLUTIONS, Motion, argument, axes_of, broadcast_axis, produced_axis, rule
from linearize.graph.ops import is_constant, op_name

_POOLS = frozenset(
    (
        "avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d "
        "_adaptive_avg_pool2d upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_bilinear2d "
        "upsample_bicubic2d upsample_linear1d upsample_trilinear3d _upsample_bilinear2d_aa "
        "_upsample_bicubic2d_aa _upsample_nearest_exact2d"
    ).split()
)


_MAX_POOLS = frozenset(
    ("max_pool1d max_pool2d max_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d").split()
)


_NORMS = frozenset(
    ("layer_norm group_norm instance_norm native_layer_norm native_group_norm rms_norm _fused_rms_norm").split()
)


@rule(*_POOLS)
def _pool(node: fx.Node, source: fx.Node, axis: int, before: tuple[int, ...], after: tuple[int, ...]) -> Motion:
    name = op_name(node)
    spatial = int(name.replace("_aa", "")[-2])
    padding = argument(node, "padding", 0) if name.startswith("avg_pool") else 0
    padded = any(padding) if isinstance(padding, (list, tuple)) else bool(padding)
    padded = padded or (name.startswith("avg_pool") and argument(node, "divisor_override") is not None)
    if axis >= len(before) - spatial:
        return Motion(None, f"{name} runs over the channels")
    return Motion(axis, steady=not padded)


@rule("mean", "sum")
def _mean(node: fx.Node, source: fx.Node, axis: int, before: tuple[int, ...], after: tuple[int, ...]) -> Motion:
    dims = axes_of(argument(node, "dim"), len(before))
    if axis in dims:
        return Motion(None, f"{op_name(node)} runs over the channels")
    keep = bool(argument(node, "keepdim"))
    moved = axis if keep else axis - sum(d < axis for d in dims)
    return Motion(moved, steady=op_name(node) == "mean")


def _constants(
    node: fx.Node, source: fx.Node, axis: int, after: tuple[int, ...], operands: int
) -> Literal["one", "each"] | None:
    """Whether the other operands are constants: "one" for all channels, or one for "each"; None if neither."""
    kind: Literal["one", "each"] = "one"
    others = [value for value in node.args[:operands] if value is not source]
    if len(others) != operands - 1:
        return None
    for other in others:
        sizes = shape(other) if isinstance(other, fx.Node) else ()
        if sizes is None or (isinstance(other, fx.Node) and not is_constant(other)):
            return None
        if math.prod(sizes) == 1:
            continue
        aligned = axis - (len(after) - len(sizes))
        if aligned < 0 or not sizes[aligned] == math.prod(sizes) == after[axis]:
            return None
        kind = "each"
    return kind


@rule("mul", "div")
def _scale(node: fx.Node, source: fx.Node, axis: int, before: tuple[int, ...], after: tuple[int, ...]) -> Motion:
    kept = broadcast_axis(before, after, axis)
    if kept is None or node.args[0] is node.args[1] or (op_name(node) == "div" and node.args[0] is not source):
        return Motion(kept, "it is multiplied by itself or divides something")
    kind = (
        None
        if op_name(node) == "div" and (len(node.args) > 2 or node.kwargs)
        else _constants(node, source, kept, after, 2)
    )
    if kind is None:
        return Motion(kept, "it is multiplied by another tensor")
    return Motion(kept, steady=False, fold=True, uniform=kind == "one")


@rule("neg")
def _negative(node: fx.Node, source: fx.Node, axis: int, before: tuple[int, ...], after: tuple[int, ...]) -> Motion:
    return Motion(axis, steady=False, fold=True, uniform=True)


@rule("add", "sub", "rsub", "addcmul")
def _add(node: fx.Node, source: fx.Node, axis: int, before: tuple[int, ...], after: tuple[int, ...]) -> Motion:
    kept = broadcast_axis(before, after, axis)
    if kept is None or _constants(node, source, kept, after, 3 if op_name(node) == "addcmul" else 2) is None:
        return Motion(kept, "it is added to something else")
    return Motion(kept, steady=False, fold=True)


@rule("batch_norm")
def _batch_norm(node: fx.Node, source: fx.Node, axis: int, before: tuple[int, ...], after: tuple[int, ...]) -> Motion:
    if source is not node.args[0] or axis != 1:
        return Motion(1 if len(after) > 1 else None, "a batch norm over another axis")
    if argument(node, "training") not in (None, False) or not isinstance(argument(node, "running_mean"), fx.Node):
        return Motion(1, "a batch norm without running statistics mixes the batch")
    return Motion(1, fold=True, steady=False)


@rule(*_NORMS)
def _norm(node: fx.Node, source: fx.Node, axis: int, before: tuple[int, ...], after: tuple[int, ...]) -> Motion:
    return Motion(axis if before == after else None, f"{op_name(node)} mixes the channels")


@rule(*_MAX_POOLS)
def _maximum(node: fx.Node, source: fx.Node, axis: int, before: tuple[int, ...], after: tuple[int, ...]) -> Motion:
    """Padding is with minus infinity, so that a constant stays that constant."""
    name = op_name(node)
    positions = axis < len(before) - int(name[-2])
    return Motion(broadcast_axis(before, after, axis), f"{name} is not linear", each=positions)


@rule("softmax", "_softmax", "log_softmax", "maximum", "minimum", "masked_fill", "where")
def _keeps(node: fx.Node, source: fx.Node, axis: int, before: tuple[int, ...], after: tuple[int, ...]) -> Motion:
    return Motion(broadcast_axis(before, after, axis), f"{op_name(node)} is not linear")


@rule("linear", "addmm", "mm", "matmul", "bmm", *CONVOLUTIONS)
def _mix(node: fx.Node, source: fx.Node, axis: int, before: tuple[int, ...], after: tuple[int, ...]) -> Motion:
    return Motion(produced_axis(node), f"{op_name(node)} mixes the channels")
