"""The convolution that replaces a block, fitted by least squares.

Shape letters: I inputs and O outputs of the block, k kernel.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from linearize.algebra.removal import regularised
from linearize.families.blocks.find import Block

__all__ = ["BlockFit", "fit_block"]


@dataclass(frozen=True)
class BlockFit:
    """Weight (O, I, k, k), bias (O,) and border (O, 1, k, k) of a convolution, float64, and the predicted loss."""

    weight: Tensor
    bias: Tensor
    loss: float
    border: Tensor | None = None


def fit_block(block: Block, kernel: int, ridge: float = 1e-3, *, bordered: bool = False) -> BlockFit:
    """Fit the best kernel of a size, with a border (the kernel of a channel of ones) or without."""
    found = block.rows[kernel]
    features = (block.inputs + bordered) * kernel**2
    last = torch.arange(len(found.mean), device=found.mean.device)[-block.outputs :]
    used = torch.cat((torch.arange(features, device=last.device), last))
    covariance, mean = found.covariance[used][:, used], found.mean[used]
    ridge = ridge if found.count > features else 0.1 * features / max(1, found.count)
    factor = torch.linalg.cholesky(regularised(covariance[:features, :features], ridge))
    weight = torch.cholesky_solve(covariance[:features, features:], factor).t()
    bias = mean[features:] - weight @ mean[:features]
    error = torch.cat((-weight, torch.eye(block.outputs, dtype=weight.dtype, device=weight.device)), 1)
    left = error @ covariance @ error.t()
    metric = torch.eye(block.outputs, dtype=weight.dtype, device=weight.device)
    if block.sensitivity is not None and block.samples:
        metric = block.sensitivity / block.samples
    kernels = weight.view(block.outputs, -1, kernel, kernel)
    border = kernels[:, block.inputs :] if bordered else None
    return BlockFit(kernels[:, : block.inputs], bias, float((metric * left).sum()), border)
