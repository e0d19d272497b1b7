"""Which channels to remove: optimal-brain-surgeon scores with exact downdates, in blocks.

The output `y = B h` of a site loses least, in mean square, if the channels removed are those that the others can
predict. With S the covariance of h and P its inverse, removing channel c and refitting the rest costs
`b_c P_cc^-1 b_c^T`. After each block of removals B and P are updated exactly, as if they had been computed
anew from the channels that are left.

Sources: Hassibi and Stork, "Second order derivatives for network pruning: Optimal Brain Surgeon", NIPS 1992; Frantar
and Alistarh, "Optimal Brain Compression", NeurIPS 2022 (rows of a layer); Kurtic, Frantar and Alistarh, "ZipLM",
NeurIPS 2023 (structures).

Shape letters: C channels, g features per channel (1, or the taps of a spatial consumer), O outputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Removal", "regularised", "removal_order"]


_WIDE = 2048  # features


@dataclass(frozen=True)
class Removal:
    """The channels of a site in the order in which they should go.

    Attributes:
        order: channel indices (C,), the first to be removed first.
        loss: (C + 1,) float64; `loss[n]` is the error of the refitted output, mean square and summed over outputs in
            the metric of the weights given, once n channels are gone.
    """

    order: Tensor
    loss: Tensor

    def keep(self, channels: int) -> Tensor:
        """Indices of the channels that stay if so many stay, ascending."""
        return self.order[len(self.order) - channels :].sort().values


def regularised(covariance: Tensor, ridge: float) -> Tensor:
    """The covariance (F, F) plus `ridge` times its own diagonal, and a little of the mean of that for dead features.

    Relative to each feature's variance: a few channels of a trained network have variances thousands of times larger.
    """
    diagonal = covariance.diagonal()
    floor = diagonal.mean().clamp(min=1e-300) * 1e-8
    return covariance + torch.diag(ridge * diagonal + floor)


def removal_order(covariance: Tensor, weight: Tensor, *, group: int = 1, ridge: float = 1e-6) -> Removal:
    """Remove all channels one block after the other, the cheapest first, each time refitting those that are left.

    Args:
        covariance: (C * g, C * g), float64, of the features, channel by channel. To choose channels beside a full
            linear skip, pass the covariance of what a linear prediction from x leaves of h.
        weight: (O, C * g): how the outputs read the features, each output scaled by what an error in it costs.
        group: g.
        ridge: relative to each feature's variance.

    Returns:
        The order, and the error after each removal. Within a block the increments are shared out by score; at the end
        of each block (of at most 1/32 of the channels left, 1/8 where features are many) the error is exact.

    Example:
        >>> covariance = torch.diag(torch.tensor([4.0, 1.0, 1.0], dtype=torch.float64))
        >>> found = removal_order(covariance, torch.tensor([[1.0, 1.0, 3.0]], dtype=torch.float64))
        >>> found.order.tolist(), [round(x, 3) for x in found.loss.tolist()]
        ([1, 0, 2], [0.0, 1.0, 5.0, 14.0])
    """
    channels = len(covariance) // group
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(regularised(covariance, ridge)))
    b = weight.to(inverse).clone()
    left = torch.arange(channels, device=inverse.device)
    part = 32 if len(inverse) <= _WIDE else 8  # each block costs a pass over the whole inverse
    order, losses = list[Tensor](), [torch.zeros(1, dtype=inverse.dtype, device=inverse.device)]
    total = torch.zeros((), dtype=inverse.dtype, device=inverse.device)
    while len(left):
        size = max(1, min(32, len(left) // part))
        scores = _scores(inverse, b, group)
        chosen = scores.topk(size, largest=False).indices
        mask = torch.ones(len(left), dtype=torch.bool, device=left.device)
        mask[chosen] = False
        gone = (chosen[:, None] * group + torch.arange(group, device=left.device)).flatten()
        stay = mask.repeat_interleave(group).nonzero().flatten()
        factor = torch.linalg.cholesky(inverse[gone][:, gone])
        columns = b[:, gone]
        solved = torch.cholesky_solve(inverse[gone], factor)  # P_DD^-1 P_D,:
        block = torch.cholesky_solve(columns.t(), factor)
        increment = (columns.t() * block).sum()
        share = scores[chosen].clamp(min=0)
        share = share / share.sum() if share.sum() > 0 else torch.full_like(share, 1 / size)
        losses.append(total + increment * share.cumsum(0))
        total = total + increment
        b = (b - columns @ solved)[:, stay]
        inverse = (inverse - inverse[:, gone] @ solved)[stay][:, stay]
        inverse = (inverse + inverse.t()) / 2
        order.append(left[chosen])
        left = left[mask]
    return Removal(torch.cat(order), torch.cat(losses))


def _scores(inverse: Tensor, b: Tensor, group: int) -> Tensor:
    """`tr(B_c P_cc^-1 B_c^T)` for every channel."""
    if group == 1:
        return b.square().sum(0) / inverse.diagonal().clamp(min=1e-300)
    channels = len(inverse) // group
    blocks = inverse.view(channels, group, channels, group).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    columns = b.view(b.shape[0], channels, group).permute(1, 2, 0)
    scores: Tensor = (columns * torch.linalg.solve(blocks, columns)).sum((1, 2))
    return scores
