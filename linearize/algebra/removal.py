"""Choose the channels to remove: scores of the optimal brain surgeon, removed in blocks with exact updates.

The output `y = B h` of a site changes least, in mean square, if the removed channels are those that the others can
predict. Let S be the covariance of h, and P its inverse. Removing channel c and refitting the others costs `b_c P_cc^-1
b_c^T`. After each block of removals, B and P are updated exactly to the channels that are left. The updates of P are
collected as factors, `P - V^T V`, and applied for several blocks at once.

Sources: Hassibi and Stork, "Second order derivatives for network pruning: Optimal Brain Surgeon", NIPS 1992; Frantar
and Alistarh, "Optimal Brain Compression", NeurIPS 2022 (rows of a layer); Kurtic, Frantar and Alistarh, "ZipLM",
NeurIPS 2023 (structures).

Shape letters: C channels, g features per channel (1, or the positions of the kernel of a spatial consumer), O outputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Removal", "regularised", "removal_order"]


_PANEL = 256  # features removed before the inverse is updated
_PART = 32  # at most this part of the channels left, and at most so many, go at once


@dataclass(frozen=True)
class Removal:
    """The channels of a site in the order of their removal.

    Attributes:
        order: channel indices (C,), the first to be removed first.
        loss: (C + 1,) float64; `loss[n]` is the error of the refitted output, mean square and summed over outputs in
            the metric of the weights given, once n channels are gone.
    """

    order: Tensor
    loss: Tensor

    def keep(self, channels: int) -> Tensor:
        """Indices of the channels that stay, ascending, for a number of channels."""
        return self.order[len(self.order) - channels :].sort().values


def regularised(covariance: Tensor, ridge: float) -> Tensor:
    """The covariance (F, F) with `ridge` times its diagonal, and a small constant, added to the diagonal.

    Relative to each feature's variance: a few channels of a trained network have variances thousands of times larger.
    """
    diagonal = covariance.diagonal()
    floor = diagonal.mean().clamp(min=1e-300) * 1e-8
    found = covariance.clone()
    found.diagonal().add_(ridge * diagonal + floor)
    return found


def removal_order(covariance: Tensor, weight: Tensor, *, group: int = 1, ridge: float = 1e-6) -> Removal:
    """Remove all channels block by block, the cheapest first, and refit the others each time.

    Args:
        covariance: (C * g, C * g), float64, of the features, channel by channel. To choose channels beside a full
            linear skip, pass the covariance of what a linear prediction from x leaves of h.
        weight: (O, C * g): how the outputs read the features, each output scaled by what an error in it costs.
        group: g.
        ridge: relative to each feature's variance.

    Returns:
        The order, and the error after each removal. Within a block the increments are shared out by score; at the end
        of each block (of at most 1/32 of the channels left) the error is exact.

    Examples:
        >>> covariance = torch.diag(torch.tensor([4.0, 1.0, 1.0], dtype=torch.float64))
        >>> found = removal_order(covariance, torch.tensor([[1.0, 1.0, 3.0]], dtype=torch.float64))
        >>> found.order.tolist(), [round(x, 3) for x in found.loss.tolist()]
        ([1, 0, 2], [0.0, 1.0, 5.0, 14.0])
    """
    rest = _Rest(covariance, weight, group, ridge)
    order, losses = list[Tensor](), [torch.zeros(1, dtype=rest.b.dtype, device=rest.b.device)]
    while rest.count:
        size = _block(rest.count)
        scores = rest.scores()
        chosen = scores.topk(size, largest=False).indices
        share = scores[chosen].clamp(min=0)
        order.append(rest.channels[chosen])
        increment = rest.remove(chosen)
        share = share / share.sum() if share.sum() > 0 else torch.full_like(share, 1 / size)
        losses.append(losses[-1][-1] + increment * share.cumsum(0))
    return Removal(torch.cat(order), torch.cat(losses))


def _block(count: int) -> int:
    """How many of the channels left go at once."""
    return max(1, min(_PART, count // _PART))


class _Rest:
    """The channels that are left: their inverse covariance, and how the outputs read them after refitting.

    Attributes:
        channels: by index, of those here; some of them may be gone already.
        count: of those that are left.
        b: weight, refitted, (O, C * g); zero for channels that are gone.
    """

    def __init__(self, covariance: Tensor, weight: Tensor, group: int, ridge: float) -> None:
        self.inverse = torch.cholesky_inverse(torch.linalg.cholesky(regularised(covariance, ridge)))
        self.b = weight.to(self.inverse).clone()
        self.group = group
        self.count = len(covariance) // group
        self.channels = torch.arange(self.count, device=covariance.device)
        self._start()

    def _start(self) -> None:
        """Begin a panel: nothing is waiting to be carried out."""
        size, group = len(self.channels), self.group
        self.gone = torch.zeros(size, dtype=torch.bool, device=self.channels.device)
        self.waiting = self.inverse.new_empty(_PANEL + _block(size) * group, len(self.inverse))
        self.filled = 0
        self.blocks = self.inverse.view(size, group, size, group).diagonal(dim1=0, dim2=2).permute(2, 0, 1).clone()

    def scores(self) -> Tensor:
        """`tr(B_c P_cc^-1 B_c^T)` for every channel; infinite for those that are gone."""
        size, group = len(self.channels), self.group
        if group == 1:
            found = self.b.square().sum(0) / self.blocks.view(-1).clamp(min=1e-300)
        else:
            eye = torch.eye(group, dtype=self.b.dtype, device=self.b.device)
            blocks = torch.where(self.gone[:, None, None], eye, self.blocks)
            columns = self.b.view(-1, size, group).permute(1, 2, 0)
            found = (columns * torch.linalg.solve(blocks, columns)).sum((1, 2))
        return found.masked_fill(self.gone, torch.inf)

    def remove(self, chosen: Tensor) -> Tensor:
        """Remove channels and refit the others. Returns the cost."""
        features = (chosen[:, None] * self.group + torch.arange(self.group, device=chosen.device)).flatten()
        waiting = self.waiting[: self.filled]
        rows = self.inverse[features] - waiting[:, features].t() @ waiting
        factor = torch.linalg.cholesky(rows[:, features])
        half = torch.linalg.solve_triangular(factor, rows, upper=False)
        lost = torch.linalg.solve_triangular(factor, self.b[:, features].t(), upper=False)
        self.b -= lost.t() @ half
        self.b[:, features] = 0
        self.waiting[self.filled : self.filled + len(features)] = half
        self.filled += len(features)
        parts = half.view(len(features), -1, self.group)
        self.blocks -= torch.einsum("rci,rcj->cij", parts, parts)
        self.gone[chosen] = True
        self.count -= len(chosen)
        if self.filled >= _PANEL and self.count:
            self._carry_out()
        cost: Tensor = lost.square().sum()
        return cost

    def _carry_out(self) -> None:
        """Update the inverse by all that is waiting, and forget what is gone."""
        stay = (~self.gone).nonzero().flatten()
        features = (~self.gone).repeat_interleave(self.group).nonzero().flatten()
        half = self.waiting[: self.filled, features]
        rows = self.inverse[features]
        del self.inverse  # each takes as much memory as the covariance
        self.inverse = rows[:, features]
        del rows
        self.inverse.addmm_(half.t(), half, alpha=-1)
        self.b = self.b[:, features].contiguous()
        self.channels = self.channels[stay]
        self._start()
