"""Refit: the best weights for the kept channels, a linear skip and the bias, after other channels are removed.

Let N be the channels that stay, and x the site's input. Minimise over B_N, W and the bias

    E | M^(1/2) (y - B_N h_N - W x - bias) |^2,    y = B h + c,    rank(W) <= r

in closed form, from the covariance of (x, h). Without a limit on the rank, the metric M does not matter. With a limit,
this is a reduced-rank regression (Izenman, 1975): what h_N does not explain of y is regressed on what h_N does not
explain of x.

Shape letters: I inputs, C channels, g features per channel, K channels that stay, O outputs, r rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial

import torch
from torch import Tensor

from linearize.algebra.removal import regularised

__all__ = ["Fit", "balanced", "conditional", "fit", "rank_losses", "residual_weight", "square_root"]


@dataclass(frozen=True)
class Fit:
    """The refitted output `y = weight h_N + left (right x) + bias`; all float64.

    Attributes:
        weight: (O, K * g).
        bias: (O,).
        left, right: (O, r) and (r, I), the skip; r = 0 for none.
        measure: gives the loss.
    """

    weight: Tensor
    bias: Tensor
    left: Tensor
    right: Tensor
    measure: Callable[[], float] = field(repr=False, compare=False)

    @cached_property
    def loss(self) -> float:
        """Mean square error in the metric. It costs as much as the fit, so it is computed when it is asked for."""
        return self.measure()


def square_root(metric: Tensor) -> Tensor:
    """The symmetric square root of a positive semidefinite matrix.

    Examples:
        >>> square_root(torch.diag(torch.tensor([4.0, 9.0]))).diagonal().tolist()
        [2.0, 3.0]
    """
    values, vectors = torch.linalg.eigh(metric)
    root: Tensor = (vectors * values.clamp(min=0).sqrt()) @ vectors.t()
    return root


def conditional(covariance: Tensor, given: Tensor, of: Tensor, ridge: float) -> Tensor:
    """Covariance of the features `of` (indices) after their best linear prediction from the features `given`."""
    s_of, s_mixed = covariance[of][:, of], covariance[given][:, of]
    if not len(given):
        return s_of
    factor = torch.linalg.cholesky(regularised(covariance[given][:, given], ridge))
    half: Tensor = torch.linalg.solve_triangular(factor, s_mixed, upper=False)
    found = s_of - half.t() @ half
    return (found + found.t()) / 2


def residual_weight(covariance: Tensor, weight: Tensor, given: Tensor, of: Tensor, ridge: float) -> Tensor:
    """Best linear prediction of `weight @ features[of]` from `features[given]`: (O, len(given))."""
    factor = torch.linalg.cholesky(regularised(covariance[given][:, given], ridge))
    return torch.cholesky_solve(covariance[given][:, of] @ weight.t(), factor).t()


def fit(
    covariance: Tensor,
    mean: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    inputs: int,
    keep: Tensor,
    rank: int | None = 0,
    root: Tensor | None = None,
    ridge: float = 1e-6,
) -> Fit:
    """Refit a site's output on the features that stay.

    Args:
        covariance: of (x, h), (I + C * g, I + C * g), float64.
        mean: of (x, h), (I + C * g,).
        weight: of the consumers, (O, C * g).
        bias: of the consumers, (O,).
        inputs: I; 0 where x was not observed.
        keep: indices of the features of h that stay, ascending.
        rank: of the skip: 0 for none, None for a full one.
        root: M^(1/2), (O, O); None is the identity.
        ridge: relative to each feature's variance; the refitted weights are drawn towards the old ones.

    Examples:
        >>> s = torch.tensor([[2.0, 1.0], [1.0, 2.0]], dtype=torch.float64)  # two channels, no skip
        >>> one = torch.ones(1, 2, dtype=torch.float64)
        >>> found = fit(s, torch.zeros(2).double(), one, torch.zeros(1).double(), inputs=0, keep=torch.tensor([0]))
        >>> round(found.weight.item(), 3), round(found.loss, 3)
        (1.5, 1.5)
    """
    features = weight.shape[1]
    root = torch.eye(len(weight), dtype=weight.dtype, device=weight.device) if root is None else root
    gone = torch.ones(features, dtype=torch.bool, device=weight.device)
    gone[keep] = False
    dropped = gone.nonzero().flatten()
    kept = keep + inputs
    x = torch.arange(inputs, device=weight.device)
    lost = weight[:, dropped]
    full = inputs > 0 and rank is None
    given = torch.cat((x, kept)) if full else kept
    left, right = weight.new_zeros(len(weight), 0), weight.new_zeros(0, inputs)
    if full:
        found = residual_weight(covariance, lost, given, dropped + inputs, ridge)
        left, right = factors(found[:, :inputs])
        added = found[:, inputs:]
    else:
        if inputs and rank:
            left, right = _reduced_rank(covariance, lost, kept, dropped + inputs, inputs, rank, root, ridge)
        added = _beside_skip(covariance, lost, left @ right, kept, dropped + inputs, inputs, ridge)
    new = weight[:, keep] + added
    shift = weight @ mean[inputs:] - new @ mean[kept] - left @ (right @ mean[:inputs])
    loss = partial(_loss, covariance, root, lost, added, left @ right, kept, dropped + inputs, inputs)
    return Fit(new, bias + shift, left, right, loss)


def factors(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """A matrix (O, I) as a product without any loss: one of the two factors is the identity."""
    outputs, inputs = matrix.shape
    if inputs <= outputs:
        return matrix, torch.eye(inputs, dtype=matrix.dtype, device=matrix.device)
    return torch.eye(outputs, dtype=matrix.dtype, device=matrix.device), matrix


def rank_losses(
    covariance: Tensor,
    weight: Tensor,
    order: Tensor,
    widths: Sequence[int],
    inputs: int,
    root: Tensor,
    ridge: float,
) -> dict[int, tuple[float, Tensor]]:
    """Mean square error with a full skip, and the increase for each rank less, for nested sets of features.

    The features that stay are the last `width` of `order`. With those that stay longest put first, one Cholesky factor
    holds the regression on every such set: its leading block is the factor of the set, and the rows below it are what
    the set says about the rest.

    Args:
        covariance: of (x, h), (I + C * g, I + C * g), float64.
        weight: of the consumers, (O, C * g).
        order: indices of all features of h, the first to go first.
        widths: numbers of features that stay.
        inputs: I.
        root: M^(1/2), (O, O).
        ridge: relative to each feature's variance.

    Returns:
        By width: the error with the full skip, and (min(I, O),) squared singular values, the largest first. The error
        with rank r is the first plus the sum of the values from index r on.
    """
    longest = order.flip(0)
    hidden = covariance[inputs:, inputs:][longest][:, longest]
    x = covariance[:inputs, :inputs]
    read = root @ weight[:, longest]
    factor = torch.linalg.cholesky(regularised(hidden, ridge))
    # What the leading features say about x, and about what the outputs read of all features.
    of_x = torch.linalg.solve_triangular(factor, covariance[inputs:, :inputs][longest], upper=False)
    penalty = (regularised(hidden, ridge) - hidden).diagonal()
    ridge_x = torch.diag((regularised(x, ridge) - x).diagonal())
    told = torch.zeros(len(longest), len(weight), dtype=read.dtype, device=read.device)
    mixed = torch.zeros(inputs, len(weight), dtype=read.dtype, device=read.device)
    lost = torch.zeros((), dtype=read.dtype, device=read.device)
    end, found = len(longest), {}
    for width in sorted(widths, reverse=True):  # the rows of what is lost are added up, the widest set first
        some = slice(width, end)
        told += factor[some].t() @ read[:, some].t()
        mixed += covariance[:inputs, inputs:][:, longest[some]] @ read[:, some].t()
        lost = lost + (penalty[some] * read[:, some].square().sum(0)).sum()
        end = width
        left_x = x - of_x[:width].t() @ of_x[:width]
        left_mixed = mixed - of_x[:width].t() @ told[:width]
        least = told[width:].square().sum() - lost - _explained(left_x + ridge_x, left_mixed).square().sum()
        half = _explained(regularised(left_x, ridge), left_mixed)
        small = half @ half.t() if inputs < len(weight) else half.t() @ half
        found[width] = float(least), torch.linalg.eigvalsh(small).flip(0).clamp(min=0)
    return found


def _explained(covariance: Tensor, mixed: Tensor) -> Tensor:
    """Coordinates (I, O), in which lengths count, of what features of a covariance say about outputs."""
    half: Tensor = torch.linalg.solve_triangular(torch.linalg.cholesky(covariance), mixed, upper=False)
    return half


def _reduced_rank(
    covariance: Tensor, lost: Tensor, kept: Tensor, dropped: Tensor, inputs: int, rank: int, root: Tensor, ridge: float
) -> tuple[Tensor, Tensor]:
    """The factors of the best skip of a rank: project the full one onto the leading directions of its output."""
    together = torch.cat((torch.arange(inputs, device=lost.device), dropped))
    left = conditional(covariance, kept, together, ridge)
    s_x, s_xd = left[:inputs, :inputs], left[:inputs, inputs:]
    factor = torch.linalg.cholesky(regularised(s_x, ridge))
    scaled = root @ lost
    whole = torch.cholesky_solve(s_xd @ scaled.t(), factor).t()  # (O, I), in the metric
    half = torch.linalg.solve_triangular(factor, s_xd @ scaled.t(), upper=False)
    vectors = torch.linalg.eigh(half.t() @ half).eigenvectors.flip(1)[:, :rank]
    return balanced(torch.linalg.lstsq(root, vectors).solution, vectors.t() @ whole)


def balanced(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """The same product, scaled so that each column of the left factor has the norm of its row of the right factor.

    This scaling is the easiest to train. The steps of Adam have one size, and would ruin a factor of tiny entries whose
    partner is huge.

    Examples:
        >>> left, right = balanced(torch.tensor([[100.0]]), torch.tensor([[0.01, 0.0]]))
        >>> left.tolist(), right.tolist()
        ([[1.0]], [[1.0, 0.0]])
    """
    down, up = left.norm(dim=0), right.norm(dim=1)
    scale = torch.where((down > 0) & (up > 0), (up / down.clamp(min=1e-300)).sqrt(), torch.ones_like(up))
    return left * scale, right / scale[:, None]


def _beside_skip(
    covariance: Tensor, lost: Tensor, skip: Tensor, kept: Tensor, dropped: Tensor, inputs: int, ridge: float
) -> Tensor:
    """What the kept features add for `lost @ h_D - skip @ x`: (O, K * g)."""
    if not len(kept):
        return lost.new_zeros(len(lost), 0)
    factor = torch.linalg.cholesky(regularised(covariance[kept][:, kept], ridge))
    mixed = covariance[kept][:, dropped] @ lost.t()
    if skip.shape[1]:
        mixed = mixed - covariance[kept][:, :inputs] @ skip.t()
    return torch.cholesky_solve(mixed, factor).t()


def _loss(
    covariance: Tensor, root: Tensor, lost: Tensor, added: Tensor, skip: Tensor, kept: Tensor, dropped: Tensor, i: int
) -> float:
    """Mean square, in the metric, of `lost h_D - added h_N - skip x`: evaluated, whatever the ridge did."""
    parts, index = [lost, -added], [dropped, kept]
    if skip.shape[1]:
        parts.append(-skip)
        index.append(torch.arange(i, device=lost.device))
    error = root @ torch.cat(parts, 1)
    where = torch.cat(index)
    return float((error @ covariance[where][:, where] * error).sum().clamp(min=0))
