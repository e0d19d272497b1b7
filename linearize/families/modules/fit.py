"""The linear map that replaces a module, fitted by least squares.

Shape letters: I inputs and O outputs of the module.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from linearize.algebra.removal import regularised
from linearize.families.modules.place import Whole

__all__ = ["WholeFit", "fit_whole"]


@dataclass(frozen=True)
class WholeFit:
    """Weight (O, I) and bias (O,) of a linear map, float64, and the predicted loss."""

    weight: Tensor
    bias: Tensor
    loss: float


def fit_whole(whole: Whole, ridge: float = 1e-3) -> WholeFit | None:
    """Fit the map by least squares. If input and output have equal widths, the ridge pulls it to the identity.

    None if no batch reached the module, or something that is no number.
    """
    if whole.rows is None or not whole.rows.count or not bool(whole.rows.scatter.isfinite().all()):
        return None
    inputs, covariance, mean = whole.inputs, whole.rows.covariance, whole.rows.mean
    if not whole.bias:  # moments about zero: no constant may be fitted
        covariance, mean = covariance + mean.outer(mean), torch.zeros_like(mean)
    ridge = ridge if whole.rows.count > inputs else 0.1 * inputs / whole.rows.count
    kind: dict[str, Any] = {"dtype": mean.dtype, "device": mean.device}
    same = torch.eye(whole.outputs, inputs, **kind) * float(inputs == whole.outputs)
    change = covariance[:inputs, inputs:] - covariance[:inputs, :inputs] @ same.t()
    factor = torch.linalg.cholesky(regularised(covariance[:inputs, :inputs], ridge))
    weight = torch.cholesky_solve(change, factor).t() + same
    bias = mean[inputs:] - weight @ mean[:inputs]
    error = torch.cat((-weight, torch.eye(whole.outputs, **kind)), 1)
    left = error @ covariance @ error.t()
    metric = torch.eye(whole.outputs, **kind)
    if whole.sensitivity is not None and whole.samples:
        metric = whole.sensitivity / whole.samples
    return WholeFit(weight, bias, float((metric * left).sum()))
