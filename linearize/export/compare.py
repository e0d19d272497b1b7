"""How far the outputs of a runtime are from those of the model."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from linearize.export.face import Subject
from linearize.graph.capture import tensors_of
from linearize.nest import copied

__all__ = ["distance", "expected"]


@torch.no_grad()
def expected(subject: Subject) -> list[list[Tensor]]:
    """For each batch, the tensors that the model puts out."""
    found = []
    for batch in subject.batches:
        args, kwargs = copied(batch)
        found.append([t.detach().clone() for t in tensors_of(subject.model(*args, **kwargs))])
    return found


def distance(reference: Sequence[Sequence[Tensor]], found: Sequence[Sequence[Tensor]]) -> float:
    """The largest relative error, max |a - b| / max |a|, of all outputs of all batches.

    Infinite where a shape or a count differs, or whole numbers do; NaN where something is NaN.

    Examples:
        >>> distance([[torch.tensor([1.0, 2.0])]], [[torch.tensor([1.0, 2.5])]])
        0.25
    """
    worst = 0.0
    if len(reference) != len(found) or any(len(a) != len(b) for a, b in zip(reference, found, strict=False)):
        return math.inf
    for wanted, given in zip(reference, found, strict=True):
        for a, b in zip(wanted, given, strict=True):
            error = _one(a.detach().cpu(), b.detach().cpu())
            worst = error if math.isnan(error) or error > worst else worst
            if math.isnan(worst):
                return worst
    return worst


def _one(a: Tensor, b: Tensor) -> float:
    if a.shape != b.shape:
        return math.inf
    if not a.numel():
        return 0.0
    if not (a.is_floating_point() or a.is_complex()):
        return 0.0 if torch.equal(a.long(), b.long()) else math.inf
    x, y = a.double(), b.double()
    infinite = x.isinf() | y.isinf()  # a mask, which must be the same
    if not torch.equal(x[infinite], y[infinite]):
        return math.inf
    x, y = x.masked_fill(infinite, 0), y.masked_fill(infinite, 0)
    scale = float(x.abs().max())
    error = float((x - y).abs().max())
    return error / scale if scale else (math.inf if error else 0.0)
