"""A random projection of a model's output. Its gradient shows the effect of an error anywhere in the model.

With v random, the mean of `(J^T v)(J^T v)^T` is the Gauss-Newton matrix of the distance to the model's own output
(`linearize.training.divergence`; Schraudolph, 2002). No labels are needed.

Shape letters: B samples, T positions, K classes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - as everywhere

from linearize.running.batches import Batch
from linearize.running.targets import OutputKind
from linearize.training.divergence import counted

__all__ = ["projection"]


def projection(output: Any, batch: Batch, generator: torch.Generator) -> tuple[Tensor, int]:
    """A scalar `sum(v * output)` over all parts, and the number of positions that it sums over, padding left out.

    Classes: v is the gradient of the cross entropy against a class drawn from the model's own distribution, so that its
    covariance is that of the Kullback-Leibler divergence; multi-label: the same for each yes or no. Values: v is
    normal, in units of the part's own root mean square, so that the distance is a relative squared error. Parts have
    their weights; the order in which they come does not matter.

    Examples:
        >>> z = torch.ones(4, 3, requires_grad=True)
        >>> scalar, positions = projection(z, Batch((z,)), torch.Generator().manual_seed(0))
        >>> positions
        4
    """
    found: list[tuple[float, Tensor, int]] = []
    for part in sorted(batch.meaning.parts(output, batch.labels), key=lambda part: part.name):
        z = part.tensor
        keep = counted(z.detach(), batch, part.name)
        z = z if keep is None else z[keep]
        if z.numel():
            found.append((part.weight, *_PROJECTIONS[part.kind](z, generator)))
    if not found:
        return torch.zeros(()), 0
    total, most = sum(weight for weight, *_ in found), max(count for *_, count in found)
    # Each scalar's gradients are summed over its own positions; together they are divided by `most` of them.
    terms = [scalar * (weight / total * most / count) ** 0.5 for weight, scalar, count in found]
    return (terms[0] if len(terms) == 1 else torch.stack(terms).sum()), most


def _of_classes(z: Tensor, generator: torch.Generator) -> tuple[Tensor, int]:
    z = z.reshape(-1, z.shape[-1])
    p = F.softmax(z.detach(), -1)
    drawn = torch.rand(len(p), 1, generator=generator).to(p.device)
    label = (p.cumsum(-1) < drawn).sum(-1).clamp(max=p.shape[-1] - 1)
    v = p - F.one_hot(label, p.shape[-1])
    return (v * _finite(z)).sum() * 0.5**0.5, len(z)


def _of_labels(z: Tensor, generator: torch.Generator) -> tuple[Tensor, int]:
    z = z.reshape(-1)
    p = torch.sigmoid(z.detach())
    v = p - (torch.rand(len(p), generator=generator).to(p.device) < p).to(p)
    return (v * _finite(z)).sum() * 0.5**0.5, len(z)


def _of_values(z: Tensor, generator: torch.Generator) -> tuple[Tensor, int]:
    z = _finite(z)
    count = len(z) if z.dim() else 1
    v = torch.randn(z.shape, generator=generator).to(z.device)
    size = z.detach().square().sum() / count
    return (v * z).sum() / size.sqrt().clamp(min=1e-12), count


def _finite(z: Tensor) -> Tensor:
    """The part that is not masked by an infinity: what is masked does not change."""
    return z if bool(z.detach().sum().isfinite()) else z.masked_fill(torch.isinf(z.detach()), 0)


_PROJECTIONS: dict[OutputKind, Callable[[Tensor, torch.Generator], tuple[Tensor, int]]] = {
    "classes": _of_classes,
    "multilabel": _of_labels,
    "values": _of_values,
}
