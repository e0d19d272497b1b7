"""A random projection of a model's output whose gradient tells what an error anywhere costs.

With v random, the mean of `(J^T v)(J^T v)^T` is the Gauss-Newton matrix of the distance to the model's own output
(Schraudolph, 2002): no labels are needed.

Shape letters: B samples, T positions, K classes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - as everywhere

from linearize.running.batches import Batch
from linearize.training.losses import counted, is_logits, main_output

__all__ = ["projection"]


def projection(output: Any, batch: Batch, generator: torch.Generator) -> tuple[Tensor, int]:
    """A scalar `sum(v * output)` and the number of positions that it sums over, padding left out.

    Logits: v is the gradient of the cross entropy against a class drawn from the model's own distribution, so that its
    covariance is that of the Kullback-Leibler divergence. Anything else: v is normal, in units of the output's own root
    mean square, so that the distance is a relative squared error.

    Example:
        >>> z = torch.ones(4, 3, requires_grad=True)
        >>> scalar, positions = projection(z, Batch((z,)), torch.Generator().manual_seed(0))
        >>> positions
        4
    """
    z = main_output(output).float()
    keep = counted(z, batch)
    z = z[keep] if keep is not None else z
    if is_logits(output, batch.labels):
        z = z.reshape(-1, z.shape[-1])
        p = F.softmax(z.detach(), -1)
        drawn = torch.rand(len(p), 1, generator=generator).to(p.device)
        label = (p.cumsum(-1) < drawn).sum(-1).clamp(max=p.shape[-1] - 1)
        v = p - F.one_hot(label, p.shape[-1])
        return (v * z).sum() * 0.5**0.5, len(z)
    v = torch.randn(z.shape, generator=generator).to(z.device)
    size = z.detach().square().sum() / len(z)
    return (v * z).sum() / size.sqrt().clamp(min=1e-12), len(z)
