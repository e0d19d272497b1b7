"""The channel table: how each ATen op moves, keeps or mixes the channel axis.

One rule per op: given the axis that holds the channels in an operand, where are they in the result, and what happened
to them? An op that is not in the table is an opaque boundary. It is never taken for elementwise.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from torch import fx

from linearize.graph.capture import shape
from linearize.graph.opaque import OPAQUE
from linearize.graph.ops import ACTIVATIONS, ARITHMETIC, IDENTITY, is_constant, op_name
from linearize.tensors import QUANTISE_LATER

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
# These read any operand's values; every other op reads the first one's, and from others at most shape or type.
_ANY_OPERAND = frozenset(
    (
        "mul div add sub rsub addcmul cat concat stack linear addmm mm matmul bmm baddbmm maximum minimum where "
        "masked_fill conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d"
    ).split()
)
_CONVOLUTIONS = {f"{name}{n}d": n for name in ("conv", "conv_transpose") for n in (1, 2, 3)}
_NORMS = frozenset(
    ("layer_norm group_norm instance_norm native_layer_norm native_group_norm rms_norm _fused_rms_norm").split()
)


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


_SPLITS = ("chunk", "split", "split_with_sizes", "tensor_split", "unbind", "unsafe_split")


def produced_axis(node: fx.Node) -> int | None:
    """The channel axis that an op defines by itself, whatever came in: linear maps, convolutions, norms, embeddings."""
    sizes = shape(node)
    if sizes is None or not sizes:
        return None
    name = op_name(node)
    if name in ("linear", "addmm", "layer_norm", "embedding", "rms_norm", "_fused_rms_norm"):
        return len(sizes) - 1
    if name in ("mm", "matmul", "bmm", "baddbmm") and len(sizes) > 1:
        return len(sizes) - 1
    if name in _CONVOLUTIONS:
        return len(sizes) - 1 - _CONVOLUTIONS[name]
    if name in ("batch_norm", "group_norm", "instance_norm") and len(sizes) > 1:
        return 1
    return None


def move(node: fx.Node, source: fx.Node, axis: int) -> Motion:
    """Follow the channels of `source`, held on `axis`, through `node`."""
    before, after = shape(source), shape(node)
    name = op_name(node)
    if name == "getitem":
        return _getitem(node, axis)
    if name == OPAQUE:
        return Motion(None, f"there is a quantised or packed layer: {QUANTISE_LATER}")
    if before is None or not 0 <= axis < len(before):
        return Motion(None, f"{name} reads something that is no tensor of fixed shape")
    if name in _SPLITS:
        return Motion(axis, None)  # what is kept of it is the getitem's business
    if after is None:
        return Motion(None, f"{name} gives no single tensor of fixed shape")
    rule = _RULES.get(name)
    if rule is not None and name not in _ANY_OPERAND and node.args[0] is not source:
        return Motion(None, f"{name} reads it as something else than its input")
    if rule is not None:
        return rule(node, source, axis, before, after)
    if name in ACTIVATIONS or name in ARITHMETIC:
        kept = _broadcast_axis(before, after, axis)
        return Motion(kept, f"{name} is not linear")
    return Motion(None, f"{name} is not in the channel table")


_Rule = Callable[[fx.Node, fx.Node, int, tuple[int, ...], tuple[int, ...]], Motion]
_RULES: dict[str, _Rule] = {}


def _rule(*names: str) -> Callable[[_Rule], _Rule]:
    def register(function: _Rule) -> _Rule:
        _RULES.update(dict.fromkeys(names, function))
        return function

    return register


def _argument(node: fx.Node, index: int, name: str, default: Any = None) -> Any:
    return node.args[index] if len(node.args) > index else node.kwargs.get(name, default)


def _wrap(axis: int, rank: int) -> int:
    return axis + rank if axis < 0 else axis


def _axes(value: Any, rank: int) -> list[int]:
    if value is None or value == []:
        return list(range(rank))
    return [_wrap(a, rank) for a in (value if isinstance(value, (list, tuple)) else [value])]


def _broadcast_axis(before: tuple[int, ...], after: tuple[int, ...], axis: int) -> int | None:
    moved = axis + len(after) - len(before)
    return moved if moved >= 0 and after[moved] == before[axis] else None


@_rule(*IDENTITY)
def _identity(node: fx.Node, source: fx.Node, axis: int, before: tuple[int, ...], after: tuple[int, ...]) -> Motion:
    if op_name(node).endswith("dropout") and _argument(node, 2, "train", False) is True:
        return Motion(axis, "dropout is active even in eval mode")
    if not node.meta["val"].is_floating_point():
        return Motion(axis, f"it is cast to {node.meta['val'].dtype}")
    return Motion(axis)


@_rule("permute")
def _permute(node: fx.Node, source: fx.Node, axis: int, before: tuple[int, ...], after: tuple[int, ...]) -> Motion:
    return Motion(_axes(_argument(node, 1, "dims"), len(before)).index(axis))


@_rule("transpose", "t")
def _transpose(node: fx.Node, source: fx.Node, axis: int, before: tuple[int, ...], after: tuple[int, ...]) -> Motion:
    rank = len(before)
    if rank < 2:
        return Motion(axis)
    a, b = (_wrap(_argument(node, i, f"dim{i - 1}", i - 1), rank) for i in (1, 2))
    return Motion({a: b, b: a}.get(axis, axis))


@_rule("movedim")
def _movedim(node: fx.Node, source: fx.Node, axis: int, before: tuple[int, ...], after: tuple[int, ...]) -> Motion:
    starts, ends = (_axes(node.args[i], len(before)) for i in (1, 2))
    order = [a for a in range(len(before)) if a not in starts]
    for start, end in sorted(zip(starts, ends, strict=True), key=lambda pair: pair[1]):
        order.insert(end, start)
    return Motion(order.index(axis))


@_rule("view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "_unsafe_view", "view_as", "reshape_as")
def _reshape(node: fx.Node, source: fx.Node, axis: int, before: tuple[int, ...], after: tuple[int, ...]) -> Motion:
    """The channels stay one axis if an axis of the same size has as many values in front of it and behind it."""
    front, size = math.prod(before[:axis]), before[axis]
    if node.meta["val"].dtype != source.meta["val"].dtype:
        return Motion(None, f"{op_name(node)} reads the bits as another type")
    if size == 1:  # the sizes cannot tell one axis of size 1 from another
        if after[: axis + 1] == before[: axis + 1]:
            return Motion(axis)
        return Motion(None, f"{op_name(node)} on a single channel")
    fits = [a for a, n in enumerate(after) if n == size and math.prod(after[:a]) == front]
    if fits:
        return Motion(fits[0])
    return Motion(None, f"{op_name(node)} from {list(before)} to {list(after)} mixes channels with positions")


@_rule("expand", "expand_as", "broadcast_to", "repeat", "tile")
def _expand(node: fx.Node, source: fx.Node, axis: int, before: tuple[int, ...], after: tuple[int, ...]) -> Motion:
    kept = _broadcast_axis(before, after, axis)
    return Motion(kept, None if kept is not None else f"{op_name(node)} repeats the channels")


@_rule("slice", "narrow")
def _slice(node: fx.Node, source: fx.Node, axis: int, before: tuple[int, ...], after: tuple[int, ...]) -> Motion:
    if _wrap(_argument(node, 1, "dim", 0), len(before)) != axis:
        return Motion(axis)
    if _argument(node, 4, "step", 1) != 1:
        return Motion(axis, f"{op_name(node)} takes every other channel")
    start = max(0, _wrap(_argument(node, 2, "start", 0) or 0, before[axis]))
    return Motion(axis, rows=(start, start + after[axis]))


@_rule("select")
def _select(node: fx.Node, source: fx.Node, axis: int, before: tuple[int, ...], after: tuple[int, ...]) -> Motion:
    dim = _wrap(_argument(node, 1, "dim"), len(before))
    if dim == axis:
        return Motion(None, "select takes a single channel")
    return Motion(axis - (dim < axis))


def _getitem(node: fx.Node, axis: int) -> Motion:
    source, index = node.args[0], node.args[1]
    if not isinstance(source, fx.Node) or not isinstance(index, int) or not isinstance(source.args[0], fx.Node):
        return Motion(None, "a part of the output of an op that is not in the channel table")
    name, whole, part = op_name(source), shape(source.args[0]), shape(node)
    dim = _argument(source, 1 if name == "unbind" else 2, "dim", 0)
    if whole is None or part is None or name not in _SPLITS:
        return Motion(None, f"a part of the output of {name}")
    dim = _wrap(dim, len(whole))
    if name == "unbind":
        return Motion(None, "unbind takes a single channel") if dim == axis else Motion(axis - (dim < axis))
    if dim != axis:
        return Motion(axis)
    values = source.meta.get("val")
    start = sum(int(value.shape[dim]) for value in list(values or [])[:index])
    return Motion(axis, rows=(start, start + part[axis]))


@_rule(*_POOLS)
def _pool(node: fx.Node, source: fx.Node, axis: int, before: tuple[int, ...], after: tuple[int, ...]) -> Motion:
    name = op_name(node)
    spatial = int(name.replace("_aa", "")[-2])
    padding = _argument(node, 3, "padding", 0) if name.startswith("avg_pool") else 0
    padded = any(padding) if isinstance(padding, (list, tuple)) else bool(padding)
    padded = padded or (name.startswith("avg_pool") and _argument(node, 6, "divisor_override") is not None)
    if axis >= len(before) - spatial:
        return Motion(None, f"{name} runs over the channels")
    return Motion(axis, steady=not padded)


@_rule("mean", "sum")
def _mean(node: fx.Node, source: fx.Node, axis: int, before: tuple[int, ...], after: tuple[int, ...]) -> Motion:
    dims = _axes(_argument(node, 1, "dim"), len(before))
    if axis in dims:
        return Motion(None, f"{op_name(node)} runs over the channels")
    keep = bool(_argument(node, 2, "keepdim", False))
    moved = axis if keep else axis - sum(d < axis for d in dims)
    return Motion(moved, steady=op_name(node) == "mean")


@_rule("constant_pad_nd", "pad")
def _pad(node: fx.Node, source: fx.Node, axis: int, before: tuple[int, ...], after: tuple[int, ...]) -> Motion:
    amounts: Any = _argument(node, 1, "pad")
    behind = 2 * (len(before) - 1 - axis)  # amounts are listed from the last axis to the first, two for each
    if any(amounts[behind : behind + 2]):
        return Motion(None, "padding adds channels")
    mode, value = (
        _argument(node, 2, "mode", "constant"),
        node.args[-1] if len(node.args) > 2 else node.kwargs.get("value"),
    )
    if not any(amounts) or (op_name(node) == "pad" and mode != "constant"):
        return Motion(axis)
    if isinstance(value, (int, float)) and value != 0:
        return Motion(axis, f"it is padded with {value}")
    return Motion(axis, steady=False)


@_rule(
    "roll",
    "flip",
    "index_select",
    *(f"{kind}_pad{n}d" for kind in ("reflection", "replication") for n in (1, 2, 3)),
    "cumsum",
)
def _positions(node: fx.Node, source: fx.Node, axis: int, before: tuple[int, ...], after: tuple[int, ...]) -> Motion:
    """Linear on every channel alike as long as they work on other axes."""
    name = op_name(node)
    dims = _argument(node, 2 if name == "roll" else 1, "dims")
    moved_axes = [] if "_pad" in name else _axes(dims, len(before))
    if axis in moved_axes or before[axis] != after[axis]:
        return Motion(axis if before == after else None, f"{name} reorders the channels")
    return Motion(axis, steady=name != "cumsum")


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


@_rule("mul", "div")
def _scale(node: fx.Node, source: fx.Node, axis: int, before: tuple[int, ...], after: tuple[int, ...]) -> Motion:
    kept = _broadcast_axis(before, after, axis)
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


@_rule("neg")
def _negative(node: fx.Node, source: fx.Node, axis: int, before: tuple[int, ...], after: tuple[int, ...]) -> Motion:
    return Motion(axis, steady=False, fold=True, uniform=True)


@_rule("add", "sub", "rsub", "addcmul")
def _add(node: fx.Node, source: fx.Node, axis: int, before: tuple[int, ...], after: tuple[int, ...]) -> Motion:
    kept = _broadcast_axis(before, after, axis)
    if kept is None or _constants(node, source, kept, after, 3 if op_name(node) == "addcmul" else 2) is None:
        return Motion(kept, "it is added to something else")
    return Motion(kept, steady=False, fold=True)


@_rule("batch_norm")
def _batch_norm(node: fx.Node, source: fx.Node, axis: int, before: tuple[int, ...], after: tuple[int, ...]) -> Motion:
    if source is not node.args[0] or axis != 1:
        return Motion(1 if len(after) > 1 else None, "a batch norm over another axis")
    if _argument(node, 5, "training", False) is not False or not isinstance(
        _argument(node, 3, "running_mean"), fx.Node
    ):
        return Motion(1, "a batch norm without running statistics mixes the batch")
    return Motion(1, fold=True, steady=False)


@_rule(*_NORMS)
def _norm(node: fx.Node, source: fx.Node, axis: int, before: tuple[int, ...], after: tuple[int, ...]) -> Motion:
    return Motion(axis if before == after else None, f"{op_name(node)} mixes the channels")


@_rule(*_MAX_POOLS)
def _maximum(node: fx.Node, source: fx.Node, axis: int, before: tuple[int, ...], after: tuple[int, ...]) -> Motion:
    """Padding is with minus infinity, so that a constant stays that constant."""
    name = op_name(node)
    positions = axis < len(before) - int(name[-2])
    return Motion(_broadcast_axis(before, after, axis), f"{name} is not linear", each=positions)


@_rule("softmax", "_softmax", "log_softmax", "maximum", "minimum", "masked_fill", "where")
def _keeps(node: fx.Node, source: fx.Node, axis: int, before: tuple[int, ...], after: tuple[int, ...]) -> Motion:
    return Motion(_broadcast_axis(before, after, axis), f"{op_name(node)} is not linear")


@_rule("cat", "stack")
def _cat(node: fx.Node, source: fx.Node, axis: int, before: tuple[int, ...], after: tuple[int, ...]) -> Motion:
    dim = _wrap(_argument(node, 1, "dim", 0), len(after))
    if op_name(node) == "stack":
        return Motion(axis + (dim <= axis), "it is stacked with other tensors")
    return Motion(axis, "it is concatenated with other channels" if dim == axis else "it is joined by other positions")


@_rule("linear", "addmm", "mm", "matmul", "bmm", *_CONVOLUTIONS)
def _mix(node: fx.Node, source: fx.Node, axis: int, before: tuple[int, ...], after: tuple[int, ...]) -> Motion:
    return Motion(produced_axis(node), f"{op_name(node)} mixes the channels")


def understood(node: fx.Node) -> bool:
    """Whether the table says what an op does with channels."""
    name = op_name(node)
    named = name in _RULES or name in _SPLITS or name in ACTIVATIONS or name in ARITHMETIC
    return named or name == "getitem" or produced_axis(node) is not None


def channel_axes(graph: fx.Graph) -> dict[fx.Node, int]:
    """The channel axis of every node for which it is known: defined by an op, or carried there from one."""
    known: dict[fx.Node, int] = {}
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        axis = produced_axis(node)
        if axis is None:
            moved = (move(node, source, known[source]).axis for source in node.all_input_nodes if source in known)
            axis = next((value for value in moved if value is not None), None)
        if axis is not None:
            known[node] = axis
    return known
