"""The forms that a site with linear channels can take: merged, factored, vanished. Pure functions on affine maps.

Let N be the channels that stay nonlinear, and L the linear ones, with slopes S and intercepts t. The producer is
`A x + a`, the consumer `B h + c`. Then

    y = B_N act(A_N x + a_N)  +  (B_L S A_L) x  +  (B_L (S a_L + t) + c)

A form is a dict from a place in the model to the piece that goes there. All forms of a site compute the same function
at different costs. All work is done on the device of the maps. On meta tensors, a form gives shapes and so its cost.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from linearize.algebra.affine import Affine, as_dims, border_kernel, columns, compose, obstacle, rows, scaled, stacked
from linearize.algebra.piece import IDENTITY, Infeasible, Maps, Piece, Pieces


def linear_part(maps: Maps) -> Affine:
    """The linear channels as a map of the site's input: `S A_L x + (S a_L + t)`; for a gated unit `t * up_L(x)`."""
    slope, intercept = maps.slope[maps.linear], maps.intercept[maps.linear]
    if maps.up is not None:
        return scaled(rows(maps.up, maps.linear), intercept, torch.zeros_like(intercept))
    return scaled(rows(maps.producer, maps.linear), slope, intercept)


def _constants(maps: Maps) -> tuple[Affine, ...]:
    """The consumers with the dropped channels' constants in their biases."""
    if maps.dropped.numel() == 0 or maps.up is not None:
        return maps.consumers
    constant = maps.intercept[maps.dropped]
    added = []
    for consumer in maps.consumers:
        weight = (
            consumer.weight[:, maps.dropped].flatten(2).sum(2) if consumer.dims else consumer.weight[:, maps.dropped]
        )
        added.append(replace(consumer, bias=consumer.bias + weight @ constant))
    return tuple(added)


def _merge(consumer: Affine, inner: Affine, linear: Tensor) -> Affine:
    """The merged term of one consumer, without the consumer's own bias."""
    outer = columns(consumer, linear)
    return compose(replace(outer, bias=torch.zeros_like(outer.bias)), inner)


def _check_linear(maps: Maps) -> None:
    if maps.bent:
        raise Infeasible("a maximum over positions lies between the maps")


def vanished(maps: Maps) -> Pieces:
    """The form "vanished": no channel stays, and one map leads from the site's input to its output."""
    _check_linear(maps)
    if maps.keep.numel():
        raise Infeasible("some channels stay nonlinear")
    if len(maps.consumers) != 1:
        raise Infeasible("it has more than one consumer")
    if any(maps.branches):
        raise Infeasible("its consumer also reads other channels")
    consumer, inner = _constants(maps)[0], linear_part(maps)
    why = obstacle(consumer, inner)
    if why is not None:
        raise Infeasible(why)
    follows = maps.direct or (consumer.pointwise and not consumer.strided and maps.steady)
    early = follows and not (maps.producer_at[1] == 0 and not consumer.pointwise)
    if not early and not (inner.pointwise and not inner.strided and maps.steady):
        raise Infeasible("something between the maps does not commute with them")
    merged = compose(columns(consumer, maps.linear), inner)
    layer, border = "plain", None
    if consumer.padded:
        layer, border = "border", border_kernel(columns(consumer, maps.linear), inner.bias)
        merged = replace(merged, bias=consumer.bias)
    place = _main(maps) if early else maps.consumers_at[0]
    if maps.up is not None and (not early or maps.producer_at[1] or maps.up_at[1]):
        raise Infeasible("the maps of the gated unit are convolutions")
    pieces = {_main(maps)[0]: IDENTITY, maps.consumers_at[0][0]: IDENTITY}
    pieces[place[0]] = Piece(layer, as_dims(merged, place[1]), border=border)
    if maps.up is not None:
        _open_gate(maps, pieces, merged.weight.shape[0])
    return pieces


def _main(maps: Maps) -> tuple[str, int]:
    """The place whose map carries values: the factor of a gated unit, the producer of any other site."""
    return maps.producer_at if maps.up is None else maps.up_at


def _open_gate(maps: Maps, pieces: Pieces, width: int) -> None:
    """A gated unit without nonlinear channels: its gate is the constant one."""
    if maps.packed is None:
        pieces[maps.producer_at[0]] = Piece("all_ones", number=width)
    else:
        plain = pieces[maps.up_at[0]].affine
        pieces[maps.up_at[0]] = Piece("ones", plain, number=width, at=0 if maps.packed == "gate_first" else width)


def merged(maps: Maps) -> Pieces:
    """The form "merged": the producer outputs the nonlinear channels, and the merged term beside them.

    Of a branch of a concatenation no channel has to stay: its consumer reads the other branches still.
    """
    _check_linear(maps)
    branch = bool(maps.branches) and all(maps.branches) and maps.up is None
    if maps.linear.numel() == 0 or (maps.keep.numel() == 0 and not branch):
        raise Infeasible("there is nothing to carry past the activation")
    inner, consumers = linear_part(maps), _constants(maps)
    if not all(consumer.pointwise for consumer in consumers):
        raise Infeasible("a consumer looks at more than one position")
    if maps.producer_at[1] == 0 and inner.dims:
        raise Infeasible("maps over different numbers of dimensions")
    carried: Affine | None = None
    pieces: Pieces = {}
    start = 0
    for consumer, (path, dims) in zip(consumers, maps.consumers_at, strict=True):
        term = _merge(replace(as_dims(consumer, inner.dims), stride=inner_stride(inner)), inner, maps.linear)
        term = replace(inner, weight=term.weight, bias=term.bias)
        rest = columns(consumer, maps.keep)
        if maps.steady:  # the bias travels along: the consumer then adds the carried part and nothing else
            term = replace(term, bias=term.bias + consumer.bias)
            rest = replace(rest, bias=torch.zeros_like(rest.bias))
        pieces[path] = Piece("carry", as_dims(rest, dims), number=start)
        carried = term if carried is None else stacked(carried, term)
        start += term.weight.shape[0]
    if carried is None:
        raise Infeasible("it has no consumer")
    pieces = {path: replace(piece, beside=start) for path, piece in pieces.items()}
    _produce(maps, pieces, carried)
    return pieces


def inner_stride(inner: Affine) -> tuple[int, ...]:
    """Stride one in every dimension: the carried output keeps the resolution of the hidden tensor."""
    return (1,) * inner.dims


def factored(maps: Maps) -> Pieces:
    """The form "factored": linear channels stay, behind the others, and bypass the activation. Others are dropped."""
    if maps.grouped:
        raise Infeasible("its channels are grouped and cannot be reordered")
    if maps.keep.numel() == 0 and maps.linear.numel() == 0:
        raise Infeasible("no channel is left")
    return _reordered(maps)


def _reordered(maps: Maps) -> Pieces:
    order = torch.cat((maps.keep, maps.linear))
    pieces: Pieces = {}
    for consumer, (path, dims) in zip(_constants(maps), maps.consumers_at, strict=True):
        pieces[path] = Piece("plain", as_dims(columns(consumer, order), dims))
    _produce(maps, pieces, linear_part(maps))
    return pieces


def _produce(maps: Maps, pieces: Pieces, carried: Affine) -> None:
    """The producers of a site whose hidden tensor holds the nonlinear channels and then `carried`."""
    path, dims = maps.producer_at
    kept = rows(maps.producer, maps.keep)
    if maps.up is None:
        pieces[path] = Piece("plain", as_dims(stacked(kept, carried) if carried.weight.shape[0] else kept, dims))
        return
    if dims or maps.up_at[1]:
        raise Infeasible("the maps of the gated unit are convolutions")
    width = carried.weight.shape[0]
    factor = stacked(rows(maps.up, maps.keep), carried) if width else rows(maps.up, maps.keep)
    if not width:  # nothing is carried: plain layers, only narrower
        halves = (kept, factor) if maps.packed != "up_first" else (factor, kept)
        narrow = {path: Piece("plain", kept), maps.up_at[0]: Piece("plain", factor)}
        pieces.update(narrow if maps.packed is None else {path: Piece("plain", stacked(*halves))})
        return
    if maps.packed is None:
        empty = kept.weight.shape[0] == 0
        pieces[path] = (
            Piece("all_ones", number=width) if empty else Piece("ones", kept, number=width, at=kept.weight.shape[0])
        )
        pieces[maps.up_at[0]] = Piece("plain", factor)
    elif maps.packed == "gate_first":
        pieces[path] = Piece("ones", stacked(kept, factor), number=width, at=kept.weight.shape[0])
    else:
        both = stacked(factor, kept)
        pieces[path] = Piece("ones", both, number=width, at=both.weight.shape[0])


def merged_input(maps: Maps) -> Pieces:
    """The form "merged (input)": the producer outputs the nonlinear channels and its own input for the consumers.

    Right where something that is linear per channel lies between (pooling), and for 1x1 before k x k: a channel of
    ones, padded like the others, makes the bias exact at the border.
    """
    _check_linear(maps)
    if maps.up is not None or maps.fixed_producer or maps.producer_at[1] == 0:
        raise Infeasible("its input cannot be carried")
    if maps.linear.numel() == 0 or maps.keep.numel() == 0:
        raise Infeasible("there is nothing to carry past the activation")
    inner = linear_part(maps)
    if not inner.pointwise:
        raise Infeasible("its producer looks at more than one position")
    inner = replace(inner, stride=inner_stride(inner))
    ones = not maps.constant_bias
    pieces: Pieces = {}
    for consumer, (path, dims) in zip(_constants(maps), maps.consumers_at, strict=True):
        outer = columns(consumer, maps.linear)
        term = as_dims(_merge(consumer, inner, maps.linear), dims)
        weights = [columns(consumer, maps.keep).weight, term.weight]
        if ones:
            weights.append(border_kernel(outer, inner.bias))
        bias = consumer.bias if ones else consumer.bias + term.bias
        pieces[path] = Piece("plain", replace(as_dims(consumer, dims), weight=torch.cat(weights, dim=1), bias=bias))
    pieces[maps.producer_at[0]] = Piece("input_carry", rows(maps.producer, maps.keep), number=int(ones))
    return pieces


FORMS: dict[str, Callable[[Maps], Pieces]] = {
    "vanished": vanished,
    "merged": merged,
    "merged (input)": merged_input,
    "factored": factored,
}


def multiply_adds(pieces: Pieces, positions: dict[str, int]) -> float:
    """Multiply-adds of the pieces, given the number of positions at which each is evaluated."""
    maps = ((path, piece.affine) for path, piece in pieces.items() if piece.affine is not None)
    return float(sum(positions[path] * affine.weight.numel() for path, affine in maps))
