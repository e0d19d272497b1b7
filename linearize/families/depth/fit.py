"""The map that stands for a run of layers, by weighted least squares on the last branch before it.

Shape letters: D features.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from linearize.algebra.removal import regularised
from linearize.families.depth.place import LayerSums

__all__ = ["DepthMap", "fit_run"]

_RIDGE = 1e-3


@dataclass(frozen=True)
class DepthMap:
    """What a run of layers adds, as `map @ m + shift` of the branch m before it; float64."""

    map: Tensor
    shift: Tensor


def fit_run(sums: LayerSums, length: int, *, constant: bool) -> DepthMap | None:
    """The map for the next so many layers; None if they were not looked at, or nothing was seen.

    Args:
        sums: of the branch, and of what each layer behind adds.
        length: of the run.
        constant: whether a constant may be added, too: only where the projection has a bias.
    """
    if length > sums.ahead or not sums.weight or not bool(sums.dm[:length].isfinite().all()):
        return None
    second, cross, mean = sums.mm / sums.weight, sums.dm[:length].sum(0) / sums.weight, sums.m / sums.weight
    change = sums.d[:length].sum(0) / sums.weight
    if constant:
        second, cross = second - mean.outer(mean), cross - change.outer(mean)
    ridge = _RIDGE if sums.count > sums.width else 0.1 * sums.width / max(1, sums.count)
    factor, failed = torch.linalg.cholesky_ex(regularised(second, ridge))
    if int(failed):
        return None
    found = torch.cholesky_solve(cross.t(), factor).t()
    shift = change - found @ mean if constant else torch.zeros_like(mean)
    return DepthMap(found, shift)
