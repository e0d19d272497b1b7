"""Properties of the algebra against direct evaluation, in float64, on random maps.

Shape letters: O outputs, I inputs, C hidden channels, n spatial dimensions.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - the usual name in user code
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from linearize.algebra.affine import (
    Affine,
    apply,
    as_dims,
    border_kernel,
    columns,
    compose,
    dense,
    norm_scale_shift,
    obstacle,
    rows,
    same_padding,
    scaled,
    stacked,
)
from linearize.algebra.forms import FORMS
from linearize.algebra.piece import Infeasible, Maps, Piece, Pieces

# Sums of some hundred products of numbers around 1 in another order.
CLOSE = 1e-11
thorough = settings(max_examples=80, deadline=None, derandomize=True)
sizes = st.integers(1, 4)


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def assert_same(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected, rtol=CLOSE, atol=CLOSE * (1 + float(expected.abs().max())))


@st.composite
def affines(
    draw: st.DrawFn,
    dims: int,
    inputs: int | None = None,
    outputs: int | None = None,
    kernel: int = 3,
    padding: int = 2,
    stride: int = 3,
) -> Affine:
    """A random map of `dims` dimensions; pass kernel=1, padding=0 for one that is pointwise."""
    torch.manual_seed(draw(st.integers(0, 2**20)))

    def each(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw(st.integers(low, high)) for _ in range(dims))

    o, i = outputs or draw(sizes), inputs or draw(sizes)
    bias = noise(o) * draw(st.sampled_from((0.0, 1.0)))
    return Affine(noise(o, i, *each(1, kernel)), bias, each(1, stride), each(0, padding), each(1, 2))


def sample(affine: Affine, extra: int = 13) -> Tensor:
    """An input of a map, of odd sizes."""
    n = affine.dims
    inputs = affine.weight.shape[1]
    return noise(2, 3, inputs) if n == 0 else noise(2, inputs, *(extra + k for k in range(n)))


@pytest.mark.parametrize("dims", [1, 2, 3])
@settings(thorough, max_examples=30)
@given(data=st.data())
def test_grouped_weights_as_dense_ones(dims: int, data: st.DataObject) -> None:
    groups, o, i = (data.draw(st.integers(1, 3)) for _ in range(3))
    kernel = [data.draw(st.integers(1, 3)) for _ in range(dims)]
    weight, x = noise(o * groups, i, *kernel), noise(2, i * groups, *(5 + k for k in range(dims)))
    conv: Any = (F.conv1d, F.conv2d, F.conv3d)[dims - 1]
    assert_same(conv(x, dense(weight, groups)), conv(x, weight, groups=groups))


@given(channels=sizes, eps=st.floats(1e-6, 2.0), seed=st.integers(0, 999), parts=st.lists(st.booleans(), min_size=4))
@thorough
def test_norms(channels: int, eps: float, seed: int, parts: list[bool]) -> None:
    torch.manual_seed(seed)
    weight, bias, mean = (noise(channels) for _ in range(3))
    var = noise(channels).square()
    weight_, bias_ = weight if parts[0] else None, bias if parts[1] else None
    x = noise(2, channels, 3)
    scale, shift = norm_scale_shift(weight_, bias_, mean, var, eps, channels)
    assert_same(scale[:, None] * x + shift[:, None], F.batch_norm(x, mean, var, weight_, bias_, False, 0.1, eps))
    if parts[2] and weight_ is not None:
        only, none = norm_scale_shift(weight[:1], None, None, None, 0.0, channels)  # one factor for all channels
        assert torch.equal(only, weight[:1].expand(channels))
        assert not none.any()


@pytest.mark.parametrize("dims", [0, 1, 2, 3])
@settings(thorough, max_examples=30)
@given(data=st.data())
def test_rows_columns_scales_and_stacks(dims: int, data: st.DataObject) -> None:
    affine = data.draw(affines(dims))
    o, i = affine.weight.shape[:2]
    x = sample(affine)
    y = apply(affine, x)
    axis = -1 if dims == 0 else 1
    index = torch.tensor(data.draw(st.lists(st.integers(0, o - 1), min_size=1, max_size=5)), dtype=torch.long)
    assert_same(apply(rows(affine, index), x), y.index_select(axis, index))
    inside = torch.tensor(data.draw(st.lists(st.integers(0, i - 1), min_size=1, unique=True)), dtype=torch.long)
    masked = torch.zeros_like(x).index_copy(axis, inside, x.index_select(axis, inside))
    assert_same(apply(columns(affine, inside), x.index_select(axis, inside)), apply(affine, masked))
    scale, shift = noise(o), noise(o)
    shape = (-1, *(1,) * dims)
    assert_same(apply(scaled(affine, scale, shift), x), scale.view(shape) * y + shift.view(shape))
    assert_same(apply(stacked(affine, rows(affine, index)), x), torch.cat((y, y.index_select(axis, index)), axis))


@given(data=st.data(), dims=st.integers(0, 3), other=st.integers(0, 3))
@thorough
def test_plain_maps_in_any_number_of_dimensions(data: st.DataObject, dims: int, other: int) -> None:
    affine = data.draw(affines(dims, kernel=1, padding=0, stride=1))
    assert affine.plain
    x = noise(2, affine.weight.shape[1])
    as_other = as_dims(affine, other)
    assert as_other.dims == other
    assert_same(
        apply(as_other, x.view(*x.shape, *(1,) * other)).flatten(1), x @ affine.weight.flatten(1).t() + affine.bias
    )


@pytest.mark.parametrize("dims", [0, 1, 2, 3])
@pytest.mark.parametrize("pointwise", ["neither", "inner", "outer", "both"])
@settings(thorough, max_examples=40)
@given(data=st.data())
def test_products(dims: int, pointwise: str, data: st.DataObject) -> None:
    """Strides, dilations and kernels of every kind, with padding where the product says that it is exact."""
    hidden = data.draw(sizes)
    small = {"kernel": 1, "padding": 0}
    inner = data.draw(affines(dims, outputs=hidden, **(small if pointwise in ("inner", "both") else {})))
    unpadded = {} if inner.pointwise else {"padding": 0}
    outer = data.draw(affines(dims, inputs=hidden, **(small if pointwise in ("outer", "both") else unpadded)))
    assume(obstacle(outer, inner) is None)
    x = sample(inner, extra=17 if dims < 3 else 14)
    expected = apply(outer, apply(inner, x))
    product = compose(outer, inner)
    if not outer.padded:
        assert_same(apply(product, x), expected)
        return
    # Padding inserts zeros where the hidden map holds the bias of the inner one.
    assert inner.pointwise
    ones = torch.ones_like(x[:1, :1])
    border = replace(product, weight=border_kernel(outer, inner.bias), bias=outer.bias)
    assert_same(apply(replace(product, bias=torch.zeros_like(product.bias)), x) + apply(border, ones), expected)


def test_products_that_are_not_exact_are_refused() -> None:
    two = Affine(noise(2, 2, 3), noise(2), (1,), (1,), (1,))
    assert obstacle(two, two) is not None
    assert obstacle(two, replace(two, padding=(0,))) is not None
    assert obstacle(replace(two, padding=(0,)), two) is None
    same = replace(two, padding=(0,), same=True)
    assert obstacle(same, replace(two, weight=noise(2, 2, 1), padding=(0,), stride=(2,))) is not None


@given(data=st.data(), dims=st.integers(1, 3))
@thorough
def test_products_without_hidden_channels(data: st.DataObject, dims: int) -> None:
    inner, outer = data.draw(affines(dims, outputs=2, padding=0)), data.draw(affines(dims, inputs=2, padding=0))
    empty = torch.zeros(0, dtype=torch.long)
    x = sample(inner, extra=17)
    full, none = apply(compose(outer, inner), x), apply(compose(columns(outer, empty), rows(inner, empty)), x)
    assert none.shape == full.shape
    assert_same(none, outer.bias.view(-1, *(1,) * dims).expand_as(none))


@given(data=st.data())
@thorough
def test_same_padding_keeps_every_position(data: st.DataObject) -> None:
    dims = data.draw(st.integers(1, 3))
    affine = replace(data.draw(affines(dims, padding=0)), same=True)
    x = sample(affine, extra=data.draw(st.integers(5, 9)))
    y = apply(affine, x)
    assert y.shape[2:] == tuple(math.ceil(n / s) for n, s in zip(x.shape[2:], affine.stride, strict=True))
    padding = same_padding(list(x.shape[2:]), *map(list, (affine.kernel, affine.stride, affine.dilation)))
    assert all(0 <= after - before <= 1 for before, after in zip(padding[::2], padding[1::2], strict=True))


# -- the forms of a site


def evaluate(piece: Piece, x: Tensor, axis: int) -> Tensor:
    """What the layer of a piece is to compute, said once more."""
    if piece.layer == "identity":
        return x
    if piece.layer == "all_ones":
        return torch.ones(*x.shape[:-1], piece.number, dtype=x.dtype)
    affine = piece.affine
    assert affine is not None
    steps = [slice(None)] * (x.dim() - affine.dims) + [slice(None, None, s) for s in affine.stride]
    if piece.layer == "carry":
        k, o = affine.weight.shape[1], affine.weight.shape[0]
        carried = x.narrow(axis, k + piece.number, o)
        return apply(affine, x.narrow(axis, 0, k)) + carried[tuple(steps)]
    if piece.layer == "input_carry":
        carried = x[tuple(steps)]
        ones = torch.ones_like(carried.narrow(axis, 0, 1)).repeat_interleave(piece.number, axis)
        return torch.cat((apply(affine, x), carried, ones), axis)
    if piece.layer == "border":
        assert piece.border is not None
        bias = apply(replace(affine, weight=piece.border), torch.ones_like(x[:1, :1]))
        return apply(replace(affine, bias=torch.zeros_like(affine.bias)), x) + bias
    y = apply(affine, x)
    if piece.layer == "ones":
        ones = torch.ones(*y.shape[:-1], piece.number, dtype=x.dtype)
        return torch.cat((y[..., : piece.at], ones, y[..., piece.at :]), -1)
    assert piece.layer == "plain"
    return y


BETWEEN = {
    "nothing": (lambda h, axis: h, True, True),
    "flip": (lambda h, axis: h.flip(-2 if axis == -1 else -1), True, False),  # steady, but every position moves
    "scale": (lambda h, axis: 0.5 * h, False, False),  # a constant does not stay that constant
}


def directly(maps: Maps, x: Tensor, between: Any, axis: int) -> list[Tensor]:
    """Producer, activation or line, what lies between, consumers."""
    u = apply(maps.producer, x)
    shape = (-1,) if axis == -1 else (-1, *(1,) * (u.dim() - 2))
    line = maps.slope.view(shape) * u + maps.intercept.view(shape)
    stays = torch.zeros(len(maps.slope), dtype=torch.bool)
    stays[maps.keep] = True
    h = torch.where(stays.view(shape), torch.tanh(u), line)
    if maps.up is not None:
        h = h * apply(maps.up, x)
    return [apply(consumer, between(h, axis)) for consumer in maps.consumers]


def by_pieces(maps: Maps, pieces: Pieces, x: Tensor, between: Any, axis: int) -> list[Tensor]:
    """The same through the pieces of a form."""
    keep = maps.keep.numel()

    def act(h: Tensor) -> Tensor:
        if pieces_vanish:
            return h
        return torch.cat((torch.tanh(h.narrow(axis, 0, keep)), h.narrow(axis, keep, h.shape[axis] - keep)), axis)

    pieces_vanish = keep == 0
    if maps.up is None:
        h = act(evaluate(pieces["producer"], x, axis))
    elif maps.packed is None:
        h = act(evaluate(pieces["producer"], x, axis)) * evaluate(pieces["up"], x, axis)
    else:
        first, second = evaluate(pieces["producer"], x, axis).chunk(2, -1)
        h = act(first) * second if maps.packed == "gate_first" else first * act(second)
    return [evaluate(pieces[f"consumer{n}"], between(h, axis), axis) for n in range(len(maps.consumers))]


@st.composite
def sites(draw: st.DrawFn, dims: int, gated: bool) -> tuple[Maps, Any]:
    """A random site, and what lies between its activation and its consumers."""
    c = draw(st.integers(1, 6))
    pointwise = {"kernel": 1, "padding": 0}
    producer = draw(affines(dims, outputs=c, **(pointwise if draw(st.booleans()) else {})))
    consumers = [
        draw(affines(dims, inputs=c, **(pointwise if draw(st.booleans()) else {})))
        for _ in range(draw(st.integers(1, 2)))
    ]
    between, steady, direct = BETWEEN[draw(st.sampled_from(sorted(BETWEEN)))]
    slope, intercept = noise(c), noise(c)
    zero = torch.tensor(draw(st.lists(st.booleans(), min_size=c, max_size=c)))
    slope[zero | gated] = 0
    silent = torch.tensor(draw(st.lists(st.booleans(), min_size=c, max_size=c)))
    intercept[silent] = 0
    linear = torch.tensor(draw(st.one_of(st.just([True] * c), st.lists(st.booleans(), min_size=c, max_size=c))))
    padded = any(consumer.padded for consumer in consumers)
    drops = linear & (slope == 0) & (intercept == 0 if gated or padded or not steady else torch.ones_like(linear))
    packed = draw(st.sampled_from((None, "gate_first", "up_first"))) if gated else None
    up = None
    if gated:
        up = draw(affines(dims, inputs=producer.weight.shape[1], outputs=c))
    maps = Maps(
        producer=producer,
        consumers=tuple(consumers),
        producer_at=("producer", dims),
        consumers_at=tuple((f"consumer{n}", dims) for n in range(len(consumers))),
        slope=slope,
        intercept=intercept,
        keep=(~linear).nonzero().flatten(),
        linear=(linear & ~drops).nonzero().flatten(),
        dropped=drops.nonzero().flatten(),
        up=up,
        up_at=("producer" if packed else "up", 0) if gated else ("", 0),
        steady=steady,
        direct=direct,
        packed=packed,
    )
    return maps, between


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("dims", "gated"), [(0, False), (0, True), (1, False), (2, False), (3, False)])
@settings(thorough, max_examples=40)
@given(data=st.data())
def test_forms(form: str, dims: int, gated: bool, data: st.DataObject) -> None:
    """Every form that does not refuse a site is the same function."""
    maps, between = data.draw(sites(dims, gated))
    try:
        pieces = FORMS[form](maps)
    except Infeasible:
        return
    x = sample(maps.producer, extra=15 if dims < 3 else 12)
    axis = -1 if dims == 0 else 1
    for found, expected in zip(
        by_pieces(maps, pieces, x, between, axis), directly(maps, x, between, axis), strict=True
    ):
        assert_same(found, expected)


def test_some_form_takes_each_simple_site() -> None:
    """The test above says nothing of a form that always refuses."""
    torch.manual_seed(0)
    half, everything = torch.arange(3), torch.arange(6)
    empty = torch.zeros(0, dtype=torch.long)
    ones = (1, 1)
    matrix = {"producer": Affine(noise(6, 4), noise(6)), "consumers": (Affine(noise(5, 6), noise(5)),)}
    pixels = {
        "producer": Affine(noise(6, 4, 1, 1), noise(6), ones, (0, 0), ones),
        "consumers": (Affine(noise(5, 6, 3, 3), noise(5), ones, ones, ones),),
    }
    for maps, dims, forms in (
        (matrix, 0, {"merged", "factored"}),
        (pixels, 2, {"merged (input)", "factored"}),
    ):
        places = {"producer_at": ("producer", dims), "consumers_at": (("consumer0", dims),)}
        surrogate = {"slope": noise(6), "intercept": noise(6), "dropped": empty}
        partly: Any = {**maps, **places, **surrogate, "keep": half, "linear": half + 3}
        wholly: Any = {**partly, "keep": empty, "linear": everything}
        assert {name for name in FORMS if _takes(name, Maps(**partly))} == forms
        assert _takes("vanished", Maps(**wholly))


def _takes(form: str, maps: Maps) -> bool:
    try:
        FORMS[form](maps)
    except Infeasible:
        return False
    return True
