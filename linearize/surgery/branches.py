"""A consumer behind a concatenation: each branch has its own columns, and a change of one leaves the others alone.

Let `h = [h_1, ..., h_m]` be the concatenated branches, and `B = [B_1, ..., B_m]` the columns of their consumer. Then
`y = B_1 h_1 + ... + B_m h_m + c`. A form of one branch's site gives new columns for that branch, and a new bias. Its
merged term lies in the middle of the consumer's input. Columns of the identity add it. For the last branch, the layer
does so that adds the features behind its inputs.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from linearize.algebra.affine import Affine
from linearize.algebra.piece import Infeasible, Piece
from linearize.sites.site import Port

__all__ = ["place_of", "spliced"]


def place_of(piece: Piece | None, start: int) -> int:
    """The present position of the input `start` of a consumer, after other branches have changed their widths.

    Examples:
        >>> place_of(Piece("plain", branches=((0, 4, 1),)), 4)
        1
    """
    changed = () if piece is None else piece.branches
    return start + sum(now - (stop - begin) for begin, stop, now in changed if begin < start)


def spliced(
    whole: Affine, before: Piece | None, port: Port, part: Piece, *, widen: bool = True
) -> tuple[Piece, Affine]:
    """The consumer with new columns for one branch, as a piece and as a map.

    Args:
        whole: the consumer as it is, with all its columns.
        before: the piece that it is already, if other branches have been changed.
        port: which inputs are the branch's.
        part: what a form made of the branch's columns. Its bias is the result's.
        widen: whether the branch may have more columns than before.

    Raises:
        Infeasible: the form leaves no map of the branch's channels.
    """
    if part.affine is None or part.layer not in ("plain", "carry"):
        raise Infeasible("its consumer also reads other channels")
    first = place_of(before, port.start)
    weight, bias = part.affine.weight, part.affine.bias
    layer, number = ("plain", 0) if before is None else (before.layer, before.number)
    if part.layer == "carry" and layer == "plain" and port.stop == port.total:
        layer, number = "carry", part.number
    elif part.layer == "carry":
        weight = torch.cat((weight, _added(part, whole)), dim=1)
    wider = part.beside + part.affine.weight.shape[1] > port.stop - port.start
    if wider and not widen:
        raise Infeasible("the code behind the concatenation takes no more channels")
    left, right = whole.weight[:, :first], whole.weight[:, first + port.stop - port.start :]
    changed = () if before is None else before.branches
    made = replace(whole, weight=torch.cat((left, weight, right), dim=1), bias=bias)
    now = (port.start, port.stop, weight.shape[1])
    folded = () if before is None else before.folded
    return Piece(layer, made, number, branches=(*changed, now), folded=folded), made


def _added(part: Piece, whole: Affine) -> torch.Tensor:
    """Columns that add a part of what is carried to the output: the identity, and zeros for the rest."""
    outputs = whole.weight.shape[0]
    columns = whole.weight.new_zeros(outputs, part.beside, *(1,) * whole.dims)
    each = torch.arange(outputs, device=columns.device)
    columns[each, part.number + each] = 1.0
    return columns
