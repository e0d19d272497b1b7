"""The channel table against brute force: run each op, disturb one channel, and see what changes."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - the usual name in user code
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

from linearize.graph.capture import capture, shape
from linearize.graph.channels import motion_of
from linearize.graph.motion import RULES, Motion
from linearize.graph.ops import ACTIVATIONS, op_name

Function = Callable[[Tensor], Any]


@dataclass(frozen=True)
class Case:
    """A function of one tensor that makes the op `name`, and the sizes of that tensor."""

    name: str
    function: Function
    sizes: tuple[int, ...]

    @property
    def id(self) -> str:
        return f"{self.name}-{'x'.join(map(str, self.sizes))}"


VEC, SEQ, SIG, MAP, VOL = (3, 4), (3, 5, 4), (3, 4, 6), (2, 4, 6, 5), (2, 3, 4, 5, 6)
MASK = torch.arange(4) % 2 == 0
SCALE = torch.tensor([0.5, -2.0, 3.0, 1.5])


def _bn(x: Tensor) -> Tensor:
    mean, var, weight, bias = torch.arange(16.0, dtype=x.dtype).view(4, 4)[:, : x.shape[1]] + 0.5
    return F.batch_norm(x, mean, var, weight, bias, False, 0.1, 0.3)


CASES = [
    *(Case("clone", lambda x: x.clone(), s) for s in (VEC, MAP)),
    Case("contiguous", torch.ops.aten.contiguous, SEQ),
    Case("detach", lambda x: x.detach(), SEQ),
    Case("to", lambda x: x.to(torch.float32), SEQ),
    Case("to", lambda x: x.to(torch.int32), SEQ),
    Case("_to_copy", lambda x: torch.ops.aten._to_copy(x, dtype=torch.float32), SEQ),
    Case("type_as", lambda x: x.type_as(torch.zeros(1)), SEQ),
    Case("type_as", lambda x: torch.zeros(3, 5, 4).type_as(x), SEQ),
    Case("dropout", lambda x: F.dropout(x, 0.5, training=False), SEQ),
    Case("feature_dropout", lambda x: F.dropout2d(x, 0.5, training=False), MAP),
    Case("alpha_dropout", lambda x: F.alpha_dropout(x, 0.5, training=False), SEQ),
    Case("permute", lambda x: x.permute(0, 2, 3, 1), MAP),
    Case("permute", lambda x: x.permute(-1, 0, 1), SEQ),
    Case("transpose", lambda x: x.transpose(1, -1), MAP),
    Case("transpose", lambda x: torch.swapaxes(x, 0, 1), SEQ),
    Case("transpose", lambda x: torch.swapdims(x, 0, 1), SEQ),
    Case("t", lambda x: x.t(), VEC),
    Case("t", lambda x: x.t(), (4,)),
    Case("movedim", lambda x: x.movedim(1, -1), MAP),
    Case("movedim", lambda x: x.movedim((0, 3), (2, 0)), MAP),
    Case("movedim", lambda x: torch.moveaxis(x, 0, 2), MAP),
    Case("view", lambda x: x.view(3, 20), SEQ),
    Case("view", lambda x: x.view(-1, 4), SEQ),
    Case("view", lambda x: x.view(3, 5, 2, 2), SEQ),
    Case("view", lambda x: x.view(torch.int32), SEQ),
    Case("reshape", lambda x: x.reshape(2, 4, -1), MAP),
    Case("reshape", lambda x: x.reshape(8, 30), MAP),
    Case("flatten", lambda x: x.flatten(2), MAP),
    Case("flatten", lambda x: x.flatten(1), SIG),
    Case("unflatten", lambda x: x.unflatten(1, (2, 2)), MAP),
    Case("unflatten", lambda x: x.unflatten(2, (3, 2)), MAP),
    Case("squeeze", lambda x: x.squeeze(), (3, 4, 1, 1)),
    Case("squeeze", lambda x: x.squeeze(1), (3, 1, 4)),
    Case("squeeze", lambda x: x.squeeze(-1), (1, 4, 1)),
    Case("unsqueeze", lambda x: x.unsqueeze(1), VEC),
    Case("unsqueeze", lambda x: x.unsqueeze(-1), (1, 1, 3)),
    Case("_unsafe_view", lambda x: torch.ops.aten._unsafe_view(x, [3, 20]), SEQ),
    Case("view_as", lambda x: x.view_as(torch.zeros(3, 20)), SEQ),
    Case("view_as", lambda x: torch.ones(60).view_as(x), SEQ),
    Case("reshape_as", lambda x: x.reshape_as(torch.zeros(15, 4)), SEQ),
    Case("expand", lambda x: x.expand(2, 3, 5, 4), SEQ),
    Case("expand", lambda x: x.expand(3, 4, 2), (3, 4, 1)),
    Case("expand", lambda x: x.expand(3, 4, 2), (3, 1, 2)),
    Case("expand_as", lambda x: x.expand_as(torch.zeros(2, 3, 4)), VEC),
    Case("broadcast_to", lambda x: x.broadcast_to(2, 3, 4), VEC),
    Case("repeat", lambda x: x.repeat(2, 1, 3), SEQ),
    Case("repeat", lambda x: x.repeat(2, 1, 1, 1), SEQ),
    Case("tile", lambda x: x.tile(2, 1), VEC),
    Case("slice", lambda x: x[:, 1:3], MAP),
    Case("slice", lambda x: x[:, -3:], MAP),
    Case("slice", lambda x: x[:, -9:3], MAP),
    Case("slice", lambda x: x[:, ::2], MAP),
    Case("slice", lambda x: x[:, :, ::2], MAP),
    Case("slice", lambda x: x[..., 1:99], MAP),
    Case("narrow", lambda x: x.narrow(1, 1, 2), MAP),
    Case("narrow", lambda x: x.narrow(1, -2, 2), MAP),
    Case("select", lambda x: x[:, 1], MAP),
    Case("select", lambda x: x.select(-1, 2), MAP),
    Case("getitem", lambda x: x.chunk(2, 1)[1], MAP),
    Case("getitem", lambda x: x.split(3, 1)[1], MAP),
    Case("getitem", lambda x: x.split([1, 2, 1], 1)[1], MAP),
    Case("getitem", lambda x: x.tensor_split(3, -1)[1], SEQ),
    Case("getitem", lambda x: x.unbind(1)[2], MAP),
    Case("getitem", lambda x: x.unbind(-1)[0], MAP),
    Case("getitem", lambda x: x.max(1)[0], MAP),
    Case("avg_pool1d", lambda x: F.avg_pool1d(x, 2), SIG),
    Case("avg_pool1d", lambda x: F.avg_pool1d(x, 3, 1, 1), SIG),
    Case("avg_pool2d", lambda x: F.avg_pool2d(x, 2, ceil_mode=True), MAP),
    Case("avg_pool2d", lambda x: F.avg_pool2d(x, 3, 2, 1, count_include_pad=False), MAP),
    Case("avg_pool2d", lambda x: F.avg_pool2d(x, 2, divisor_override=3), MAP),
    Case("avg_pool3d", lambda x: F.avg_pool3d(x, 2), VOL),
    Case("avg_pool3d", lambda x: F.avg_pool3d(x, 2, divisor_override=3), VOL),
    Case("adaptive_avg_pool1d", lambda x: F.adaptive_avg_pool1d(x, 4), SIG),
    Case("adaptive_avg_pool2d", lambda x: F.adaptive_avg_pool2d(x, (1, 3)), MAP),
    Case("adaptive_avg_pool3d", lambda x: F.adaptive_avg_pool3d(x, 2), VOL),
    Case("_adaptive_avg_pool2d", lambda x: torch.ops.aten._adaptive_avg_pool2d(x, [1, 1]), MAP),
    Case("upsample_nearest1d", lambda x: F.interpolate(x, scale_factor=2), SIG),
    Case("upsample_nearest2d", lambda x: F.interpolate(x, size=(3, 7)), MAP),
    Case("upsample_nearest3d", lambda x: F.interpolate(x, scale_factor=2), VOL),
    Case("upsample_linear1d", lambda x: F.interpolate(x, scale_factor=2, mode="linear"), SIG),
    Case("upsample_bilinear2d", lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"), MAP),
    Case("upsample_bicubic2d", lambda x: F.interpolate(x, scale_factor=2, mode="bicubic"), MAP),
    Case("upsample_trilinear3d", lambda x: F.interpolate(x, scale_factor=2, mode="trilinear"), VOL),
    Case("_upsample_bilinear2d_aa", lambda x: F.interpolate(x, size=(3, 3), mode="bilinear", antialias=True), MAP),
    Case("_upsample_bicubic2d_aa", lambda x: F.interpolate(x, size=(3, 3), mode="bicubic", antialias=True), MAP),
    Case("_upsample_nearest_exact2d", lambda x: F.interpolate(x, size=(3, 3), mode="nearest-exact"), MAP),
    Case("mean", lambda x: x.mean((2, 3)), MAP),
    Case("mean", lambda x: x.mean((-1, -2), keepdim=True), MAP),
    Case("mean", lambda x: x.mean(), MAP),
    Case("mean", lambda x: x.mean(0), SEQ),
    Case("sum", lambda x: x.sum(1), SEQ),
    Case("sum", lambda x: x.sum([]), SEQ),
    Case("pad", lambda x: F.pad(x, (1, 2)), MAP),
    Case("pad", lambda x: F.pad(x, (0, 0, 0, 0)), MAP),
    Case("pad", lambda x: F.pad(x, (1, -1)), MAP),
    Case("pad", lambda x: F.pad(x, (0, 0, 0, 0, 1, -1)), MAP),
    Case("pad", lambda x: F.pad(x, (0, 0, 0, 0, 0, 2)), MAP),
    Case("pad", lambda x: F.pad(x, (1, 1), value=2.0), MAP),
    Case("pad", lambda x: F.pad(x, (1, 1, 1, 1), mode="reflect"), MAP),
    Case("pad", lambda x: F.pad(x, (1, 1, 1, 1), mode="circular"), MAP),
    Case("constant_pad_nd", lambda x: torch.ops.aten.constant_pad_nd(x, [1, 1]), SEQ),
    Case("constant_pad_nd", lambda x: torch.ops.aten.constant_pad_nd(x, [1, -1]), SEQ),
    Case("constant_pad_nd", lambda x: torch.ops.aten.constant_pad_nd(x, [1, 1], 0.5), SEQ),
    Case("reflection_pad1d", lambda x: torch.ops.aten.reflection_pad1d(x, [1, 2]), SIG),
    Case("reflection_pad2d", lambda x: torch.ops.aten.reflection_pad2d(x, [1, 2, 0, 1]), MAP),
    Case("reflection_pad3d", lambda x: torch.ops.aten.reflection_pad3d(x, [1] * 6), VOL),
    Case("replication_pad1d", lambda x: torch.ops.aten.replication_pad1d(x, [1, 2]), SIG),
    Case("replication_pad2d", lambda x: torch.ops.aten.replication_pad2d(x, [1, 2, 0, 1]), MAP),
    Case("replication_pad3d", lambda x: torch.ops.aten.replication_pad3d(x, [1] * 6), VOL),
    Case("roll", lambda x: x.roll(1, 2), MAP),
    Case("roll", lambda x: x.roll((1, 2), (2, -1)), MAP),
    Case("roll", lambda x: x.roll(1), SEQ),
    Case("flip", lambda x: x.flip(-1), MAP),
    Case("flip", lambda x: x.flip((0, 1)), MAP),
    Case("index_select", lambda x: x.index_select(2, torch.tensor([3, 0, 0])), MAP),
    Case("index_select", lambda x: x.index_select(1, torch.tensor([3, 1, 2, 0])), MAP),
    Case("cumsum", lambda x: x.cumsum(-1), SIG),
    Case("cumsum", lambda x: x.cumsum(1), SIG),
    Case("mul", lambda x: x * 3, SEQ),
    Case("mul", lambda x: x * SCALE, SEQ),
    Case("mul", lambda x: SCALE * x, SEQ),
    Case("mul", lambda x: x * SCALE[:, None, None], MAP),
    Case("mul", lambda x: x * torch.tensor(2.0), SEQ),
    Case("mul", lambda x: x * torch.arange(5.0)[:, None], SEQ),
    Case("mul", lambda x: x * torch.ones(2, 3, 5, 4), SEQ),
    Case("mul", lambda x: x * x, SEQ),
    Case("div", lambda x: x / 3, SEQ),
    Case("div", lambda x: x / SCALE, SEQ),
    Case("div", lambda x: SCALE / x, SEQ),
    Case("div", lambda x: torch.true_divide(x, 3), SEQ),
    Case("mul", lambda x: torch.multiply(x, 3), SEQ),
    Case("neg", lambda x: -x, SEQ),
    Case("add", lambda x: x + 1, SEQ),
    Case("add", lambda x: x + SCALE, SEQ),
    Case("sub", lambda x: x - SCALE, SEQ),
    Case("sub", lambda x: SCALE - x, SEQ),
    Case("add", lambda x: torch.add(x, SCALE, alpha=3), SEQ),
    Case("add", lambda x: x + torch.ones(2, 3, 5, 4), SEQ),
    Case("addcmul", lambda x: torch.addcmul(SCALE, x, SCALE, value=0.5), SEQ),
    Case("addcmul", lambda x: torch.addcmul(x, SCALE, SCALE), SEQ),
    Case("div", lambda x: x / SCALE[:, None, None], MAP),
    Case("rsub", lambda x: torch.rsub(x, 2.0), SEQ),
    Case("batch_norm", _bn, VEC),
    Case("batch_norm", _bn, MAP),
    Case("batch_norm", lambda x: F.batch_norm(x, None, None, training=True), MAP),
    Case("layer_norm", lambda x: F.layer_norm(x, (4,)), SEQ),
    Case("group_norm", lambda x: F.group_norm(x, 2), MAP),
    Case("instance_norm", F.instance_norm, MAP),
    Case("rms_norm", lambda x: F.rms_norm(x, (4,)), SEQ),
    Case("native_layer_norm", lambda x: torch.ops.aten.native_layer_norm(x, [4], None, None, 1e-5)[0], SEQ),
    Case("native_group_norm", lambda x: torch.ops.aten.native_group_norm(x, None, None, 2, 4, 30, 2, 1e-5)[0], MAP),
    Case("_fused_rms_norm", lambda x: torch.ops.aten._fused_rms_norm(x, [4], None, None)[0], SEQ),
    Case("max_pool1d", lambda x: F.max_pool1d(x, 2), SIG),
    Case("max_pool2d", lambda x: F.max_pool2d(x, 3, 1, 1), MAP),
    Case("max_pool3d", lambda x: F.max_pool3d(x, 2), VOL),
    Case("adaptive_max_pool1d", lambda x: F.adaptive_max_pool1d(x, 2), SIG),
    Case("adaptive_max_pool2d", lambda x: F.adaptive_max_pool2d(x, 2), MAP),
    Case("adaptive_max_pool3d", lambda x: F.adaptive_max_pool3d(x, 2), VOL),
    Case("softmax", lambda x: x.softmax(-1), SEQ),
    Case("_softmax", lambda x: torch.ops.aten._softmax(x, -1, False), SEQ),
    Case("log_softmax", lambda x: x.log_softmax(1), SEQ),
    Case("maximum", lambda x: torch.maximum(x, SCALE), SEQ),
    Case("minimum", lambda x: torch.minimum(SCALE, x), SEQ),
    Case("masked_fill", lambda x: x.masked_fill(MASK, 0.0), SEQ),
    Case("where", lambda x: torch.where(MASK, x, 0.0), SEQ),
    Case("cat", lambda x: torch.cat([x, x], 1), MAP),
    Case("cat", lambda x: torch.cat([x, torch.ones(2, 4, 6, 2)], -1), MAP),
    Case("stack", lambda x: torch.stack([x, x * 2], 1), SEQ),
    Case("linear", lambda x: F.linear(x, torch.ones(3, 4)), SEQ),
    Case("addmm", lambda x: torch.addmm(torch.ones(5), x, torch.ones(4, 5)), VEC),
    Case("mm", lambda x: torch.mm(x, torch.ones(4, 5)), VEC),
    Case("matmul", lambda x: torch.ones(2, 5) @ x, SEQ),
    Case("bmm", lambda x: torch.bmm(x, torch.ones(3, 4, 2)), SEQ),
    *(
        Case(f"conv{n}d", lambda x, n=n: getattr(F, f"conv{n}d")(x, torch.ones(2, x.shape[1], *(1,) * n)), s)  # type: ignore[misc]
        for n, s in ((1, SIG), (2, MAP), (3, VOL))
    ),
    *(
        Case(
            f"conv_transpose{n}d",
            lambda x, n=n: getattr(F, f"conv_transpose{n}d")(x, torch.ones(x.shape[1], 2, *(1,) * n)),  # type: ignore[misc]
            s,
        )
        for n, s in ((1, SIG), (2, MAP), (3, VOL))
    ),
]
# Names of the table that no case makes, with the reason.
UNREACHED = {"lift_fresh": "export leaves it out", "alias": "export leaves it out"}


class Wrapped(nn.Module):
    """The function, on constants as buffers would be."""

    def __init__(self, function: Function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(x)


def captured(case: Case) -> tuple[fx.Node, fx.Node]:
    """The node of the op and the node of its operand."""
    x = torch.zeros(case.sizes)
    graph = capture(Wrapped(case.function), ((x,), {})).graph
    nodes = [node for node in graph.nodes if node.op == "call_function" and op_name(node) == case.name]
    assert nodes, f"{case.name} is not in the graph: {[op_name(n) for n in graph.nodes if n.op == 'call_function']}"
    return next(node for node in nodes if node.users), graph_input(graph)


def graph_input(graph: fx.Graph) -> fx.Node:
    inputs: list[fx.Node] = [n for n in graph.nodes if n.op == "placeholder" and n.name.startswith("args")]
    assert len(inputs) == 1
    return inputs[0]


@functools.cache
def motions(case: Case) -> list[Motion]:
    """What the table says of each axis, through a chunk and the choice of a part if the op is one."""
    node, source = captured(case)
    if op_name(node) == "getitem" and isinstance(node.args[0], fx.Node) and node.args[0] is not source:
        return [motion_of(node, node.args[0], axis) for axis in range(len(case.sizes))]
    return [motion_of(node, source, axis) for axis in range(len(case.sizes))]


@pytest.mark.parametrize("case", CASES, ids=[case.id for case in CASES])
def test_rule(case: Case) -> None:
    for axis, motion in enumerate(motions(case)):
        check(case.function, torch.randn(case.sizes), axis, motion)


def check(function: Function, x: Tensor, axis: int, motion: Motion) -> None:
    """Hold what the table says of an op against what it does."""
    if motion.axis is None or motion.reason is not None:
        return
    y: Tensor = function(x)
    for channel in range(x.shape[axis]):
        moved = x.clone()
        moved.select(axis, channel).add_(torch.rand_like(moved.select(axis, channel)) + 0.5)
        changed = {index[motion.axis] for index in (function(moved) != y).nonzero().tolist()}
        first, last = motion.rows or (0, x.shape[axis])
        assert changed <= ({channel - first} if first <= channel < last else set())
        if first <= channel < last and motion.rows is not None:
            assert changed == {channel - first}
    if motion.fold and not motion.uniform:
        affine_per_channel(function, x, axis, motion)
        return
    other = torch.randn_like(x)
    torch.testing.assert_close(function(x + other), y + function(other), rtol=1e-5, atol=1e-5)
    if motion.rows is None:
        order = torch.randperm(x.shape[axis])
        shuffled = y.index_select(motion.axis, order)
        torch.testing.assert_close(function(x.index_select(axis, order)), shuffled, rtol=1e-5, atol=1e-5)
    if motion.steady and motion.rows is None:
        sizes = [1] * x.dim()
        sizes[axis] = -1
        values = torch.randn(x.shape[axis], dtype=x.dtype)
        flat = function(values.view(sizes).expand_as(x).contiguous())
        sizes = [1] * flat.dim()
        sizes[motion.axis] = -1
        torch.testing.assert_close(flat, values.to(flat.dtype).view(sizes).expand_as(flat), rtol=1e-5, atol=1e-5)


def affine_per_channel(function: Function, x: Tensor, axis: int, motion: Motion) -> None:
    """A scale and shift for each channel, the same at every position."""
    assert motion.axis == axis
    zero, one = function(torch.zeros_like(x)), function(torch.ones_like(x))
    for values in (zero, one):
        first = values.transpose(0, axis).flatten(1)[:, :1]
        assert bool((values.transpose(0, axis).flatten(1) == first).all())
    torch.testing.assert_close(function(x), zero + (one - zero) * x, rtol=1e-4, atol=1e-4)


def test_every_rule_has_a_case() -> None:
    reached = {case.name for case in CASES}
    assert set(RULES) - reached == set(UNREACHED) & set(RULES)


def test_some_cases_are_followed() -> None:
    """The check above says nothing of an op that the table gives up: these it must not give up."""
    followed = {
        case.name
        for case in CASES
        if any(motion.axis is not None and motion.reason is None for motion in motions(case))
    }
    given_up = {case.name for case in CASES} - followed
    nonlinear = {"maximum", "minimum", "masked_fill", "where", "softmax", "_softmax", "log_softmax"}
    mixing = {"linear", "addmm", "mm", "matmul", "bmm", "cat", "stack"}
    norms = {name for name in given_up if "norm" in name and name != "batch_norm"}
    pools = {name for name in given_up if "max_pool" in name}
    assert given_up == nonlinear | mixing | norms | pools | {name for name in given_up if name.startswith("conv")}


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_activations_are_elementwise_and_bend(name: str) -> None:
    if name == "softsign":
        pytest.skip("it is no op of its own, but three")
    extra: dict[str, tuple[Any, ...]] = {"prelu": (torch.tensor([0.3]),), "threshold": (0.1, 0.0)}

    def op(x: Tensor) -> Tensor:
        y: Tensor = getattr(torch.ops.aten, name)(x, *extra.get(name, ()))
        return y

    x, other = torch.randn(2, 7, 5) * 4
    assert op(x).shape == x.shape
    torch.testing.assert_close(op(x.flip(0)), op(x).flip(0))
    torch.testing.assert_close(op(x[:3]), op(x)[:3])
    assert not torch.allclose(op(x) + op(other), op(x + other) + op(torch.zeros(7, 5)), atol=1e-2)


@st.composite
def reshapes(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Sizes with many equal ones and ones of 1, and other sizes of the same product."""
    primes = draw(st.lists(st.sampled_from([2, 2, 3]), min_size=0, max_size=4))
    sizes = []
    for order in (draw(st.permutations(primes)), draw(st.permutations(primes))):
        groups = [1] * draw(st.integers(1, 4))
        for prime in order:
            groups[draw(st.integers(0, len(groups) - 1))] *= prime
        sizes.append(tuple(groups))
    return sizes[0], sizes[1]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(reshapes())
def test_reshapes_with_equal_sizes(sizes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    before, after = sizes
    assert math.prod(before) == math.prod(after)
    case = Case("reshape", lambda x: x.reshape(after), before)
    graph = capture(Wrapped(case.function), ((torch.zeros(before),), {})).graph
    nodes = [node for node in graph.nodes if node.op == "call_function"]
    if not nodes:
        return
    for axis in range(len(before)):
        motion = motion_of(nodes[0], graph_input(graph), axis)
        check(case.function, torch.randn(before), axis, motion)
        if motion.axis is not None:
            assert shape(nodes[0])[motion.axis] == before[axis]  # type: ignore[index]


def test_a_single_channel_is_only_followed_where_its_axis_is_certain() -> None:
    """Which of several axes of size 1 holds the channel shows only where nothing in front of it has changed."""
    for before, after, axis in itertools.product(
        [(1, 1, 8)], [(1, 1, 8, 1), (1, 8, 1), (8, 1), (1, 1, 2, 4)], range(3)
    ):
        graph = capture(Wrapped(lambda x, after=after: x.reshape(after)), ((torch.zeros(before),), {})).graph  # type: ignore[misc]
        node = next(node for node in graph.nodes if node.op == "call_function")
        motion = motion_of(node, graph_input(graph), axis)
        if before[axis] == 1 and motion.axis is not None:
            assert after[: axis + 1] == before[: axis + 1]
            assert motion.axis == axis
