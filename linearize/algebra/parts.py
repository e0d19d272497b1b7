"""Sites whose channels are split behind the activation, for example by a chunk. Each part takes its own form.

The model's code halves whatever width it finds. So the parts must stay equally wide: the narrower ones are filled with
channels of zeros, which nothing reads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from linearize.algebra.affine import Affine, rows, stacked
from linearize.algebra.forms import FORMS, factored, merged
from linearize.algebra.piece import Infeasible, Maps, Piece, Pieces

__all__ = ["made"]


def made(form: str, maps: Maps) -> Pieces:
    """The pieces of a form.

    Args:
        form: its name, one of `FORMS`.
        maps: of the site, whose channels may be taken apart.

    Raises:
        Infeasible: the form cannot express the site.
    """
    make = FORMS[form]
    return _by_part(make, maps) if maps.apart else make(maps)


def _by_part(make: Callable[[Maps], Pieces], maps: Maps) -> Pieces:
    if make not in (merged, factored):
        raise Infeasible("its channels are taken apart behind the activation")
    if maps.grouped and make is factored:
        raise Infeasible("its channels are grouped and cannot be reordered")
    found = [_of_part(make, _part(maps, index)) for index in range(len(maps.apart))]
    if make is merged and not any(merges for _, merges in found):
        raise Infeasible("there is nothing to carry past the activation")
    at = maps.producer_at[0]
    producers = [_map_at(pieces, at) for pieces, _ in found]
    width = max(producer.weight.shape[0] for producer in producers)
    if width == 0:
        raise Infeasible("no channel is left")
    whole = _filled_up(producers[0], width)
    for producer in producers[1:]:
        whole = stacked(whole, _filled_up(producer, width))
    pieces = {at: Piece("plain", whole)}
    for part, _ in found:
        pieces |= {place: _reading(piece, width) for place, piece in part.items() if place != at}
    return pieces


def _of_part(make: Callable[[Maps], Pieces], part: Maps) -> tuple[Pieces, bool]:
    """The pieces of one part, and whether the form holds for it: else its channels are only put in order."""
    try:
        return make(part), True
    except Infeasible:
        if part.grouped:
            raise
    if part.keep.numel() or part.linear.numel():
        return factored(part), False
    return factored(replace(part, linear=part.dropped[:1], dropped=part.dropped[1:])), False


def _part(maps: Maps, index: int) -> Maps:
    """The maps of one part."""
    width = maps.slope.numel() // len(maps.apart)
    start = index * width
    chosen = torch.arange(start, start + width, device=maps.producer.weight.device)
    keep, linear, dropped = maps.apart[index]
    mine = [position for position, part in enumerate(maps.parts) if part == index]
    return replace(
        maps,
        producer=rows(maps.producer, chosen),
        consumers=tuple(maps.consumers[position] for position in mine),
        consumers_at=tuple(maps.consumers_at[position] for position in mine),
        branches=tuple(maps.branches[position] for position in mine),
        slope=maps.slope[start : start + width],
        intercept=maps.intercept[start : start + width],
        keep=keep,
        linear=linear,
        dropped=dropped,
        parts=(),
        apart=(),
    )


def _map_at(pieces: Pieces, place: str) -> Affine:
    affine = pieces[place].affine
    if affine is None or pieces[place].layer != "plain":
        raise Infeasible("its channels are taken apart behind the activation")
    return affine


def _filled_up(affine: Affine, width: int) -> Affine:
    """The same map with outputs of zeros at the end."""
    more = width - affine.weight.shape[0]
    zeros = affine.weight.new_zeros(more, *affine.weight.shape[1:])
    bias = torch.cat((affine.bias, affine.bias.new_zeros(more)))
    return replace(affine, weight=torch.cat((affine.weight, zeros)), bias=bias)


def _reading(piece: Piece, width: int) -> Piece:
    """A consumer of a part that has become so wide."""
    if piece.affine is None:
        return piece
    weight = piece.affine.weight
    if piece.layer == "carry":
        return replace(piece, beside=width - weight.shape[1])
    zeros = weight.new_zeros(weight.shape[0], width - weight.shape[1], *weight.shape[2:])
    return replace(piece, affine=replace(piece.affine, weight=torch.cat((weight, zeros), dim=1)))
