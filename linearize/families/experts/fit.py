"""Which experts go, which channels of each, and its last matrix refitted on the channels that stay.

Shape letters: E experts, M channels of an expert, m that stay, O of what comes out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor, nn

from linearize.algebra.covariance import Covariance
from linearize.algebra.regression import Fit, fit, square_root
from linearize.algebra.removal import Removal, removal_order
from linearize.families.experts.apply import named_tensors
from linearize.families.experts.place import ExpertChannels, Experts
from linearize.families.experts.sums import ExpertSums

__all__ = ["ExpertCurve", "by_change", "by_norm", "curve_of", "quadratic"]

_RIDGE = 1e-3  # as for channels


def quadratic(sums: ExpertSums) -> Tensor:
    """Q (E, E): taking experts S away is predicted to cost the sum of Q over S x S.

    Half of it is what gradients feel of the changes, which is right on the average, and noisy for experts that few
    tokens pick; the other half counts changes in all directions alike.
    """
    share = sums.tokens / max(1.0, sums.looked)
    if not sums.energy or not sums.samples:
        return sums.change * (share / max(1.0, sums.tokens))
    everywhere = sums.energy / max(1.0, sums.looked * len(sums.sensitivity))
    found: Tensor = (sums.felt + everywhere * sums.change) * (share / (2 * sums.samples))
    return found


def by_change(costs: Tensor, most: int) -> list[int]:
    """The order in which so many experts go: each time the one that costs least beside those that are gone.

    Examples:
        >>> by_change(torch.tensor([[3.0, 0.0, 0.0], [0.0, 1.0, 2.0], [0.0, 2.0, 1.5]]), 2)
        [1, 0]
    """
    order: list[int] = []
    score = costs.diagonal().clone()
    for _ in range(most):
        best = int(score.argmin())
        order.append(best)
        score = score + 2 * costs[best]
        score[best] = torch.inf
    return order


def by_norm(sums: ExpertSums, most: int) -> list[int]:
    """The order of REAP: the mean, over the tokens that pick an expert, of its weight times the norm of what it gives.

    Source: Lasby et al., "REAP the Experts: Why Pruning Prevails for One-Shot MoE Compression", 2025
    (arXiv 2510.13999).
    """
    share = sums.tokens / max(1.0, sums.looked)
    return (sums.norms * share / sums.rows.clamp_min(1.0)).argsort(stable=True)[:most].tolist()


@dataclass
class ExpertCurve:
    """The channels of all experts of an observed place, with the weights that it has in a model.

    Attributes:
        place: observed.
        weights: (E, O, M) float64, of the last matrices.
        biases: (E, O) or None.
    """

    place: Experts
    weights: Tensor
    biases: Tensor | None
    _fits: dict[tuple[int, tuple[int, ...]], Fit] = field(default_factory=dict)

    @property
    def sums(self) -> ExpertSums:
        """What was found."""
        found: ExpertSums = self.place.sums
        return found

    @cached_property
    def root(self) -> Tensor:
        """Square root of what an error behind the mixture costs, (O, O); a little in every direction."""
        size, metric = self.weights.shape[1], self.sums.sensitivity
        if not self.sums.samples or not bool(metric.diagonal().sum() > 0):
            return torch.eye(size, dtype=torch.float64, device=metric.device)
        metric = metric * self.sums.tokens / (max(1.0, self.sums.looked) * self.sums.samples)
        return square_root(metric + torch.eye(size).to(metric) * metric.diagonal().mean() * 1e-3)

    def scale(self, expert: int) -> float:
        """The squared weight that an expert has for the mean token."""
        return float(self.sums.power[expert]) / max(1.0, self.sums.looked)

    def moments(self, expert: int) -> tuple[Tensor, Tensor, float]:
        """Covariance and mean of an expert's channels, and the ridge; moments about zero where there is no bias.

        Of one that no token picks, nothing is known: its channels count alike.
        """
        rows: Covariance = self.sums.hidden[expert]
        width = self.weights.shape[2]
        if not rows.weight or not bool(rows.scatter.diagonal().sum() > 0):
            return torch.eye(width).to(self.weights), torch.zeros(width).to(self.weights), 1.0
        whole, mean = rows.covariance, rows.mean
        if self.biases is None:
            whole, mean = whole + mean.outer(mean), torch.zeros_like(mean)
        scarce = width / max(1, rows.count)
        return whole, mean, _RIDGE if scarce < 1 else 0.1 * scarce

    @cached_property
    def removals(self) -> list[Removal]:
        """By expert, the order in which its channels go."""
        found = []
        for expert in range(self.place.count):
            covariance, _, ridge = self.moments(expert)
            weight = self.root @ self.weights[expert] * self.scale(expert) ** 0.5
            if not self.scale(expert):  # no loss tells its channels apart: the smallest go first
                weight = self.weights[expert]
            found.append(removal_order(covariance, weight, ridge=ridge))
        return found

    def loss(self, keep: int, gone: Sequence[int] = ()) -> float:
        """The error of the model's output that so many channels in all experts but some are predicted to cause."""
        left = self.weights.shape[2] - keep
        stay = [expert for expert in self.place.kept(gone) if self.scale(expert)]
        return sum(float(self.removals[expert].loss[left]) for expert in stay)

    def keep(self, expert: int, count: int) -> tuple[int, ...]:
        """The channels of an expert that stay, ascending."""
        return tuple(self.removals[expert].keep(count).tolist())

    def refitted(self, expert: int, keep: tuple[int, ...]) -> Fit:
        """The last matrix of an expert on the channels that stay; remembered, since trials ask for it again."""
        if (expert, keep) not in self._fits:
            covariance, mean, ridge = self.moments(expert)
            bias = torch.zeros_like(self.weights[expert][:, 0]) if self.biases is None else self.biases[expert]
            index = torch.tensor(keep, dtype=torch.long, device=covariance.device)
            self._fits[expert, keep] = fit(
                covariance, mean, self.weights[expert], bias, inputs=0, keep=index, root=self.root, ridge=ridge
            )
        return self._fits[expert, keep]


def curve_of(model: nn.Module, place: Experts) -> ExpertCurve | None:
    """The curve of an observed place; None if its channels are not known, or nothing reached it."""
    channels, sums = place.channels, place.sums
    if channels is None or sums is None or not sums.looked:
        return None
    bank = model.get_submodule(place.bank)
    weights = named_tensors(bank, [channels.down])[channels.down].to(sums.rows)
    weights = weights if _last(channels) else weights.transpose(1, 2)
    biases = named_tensors(bank, [channels.bias])[channels.bias].to(sums.rows) if channels.bias else None
    return ExpertCurve(place, weights, biases)


def _last(channels: ExpertChannels) -> bool:
    """Whether the channels stand on the last axis of the matrices that read them."""
    return channels.slots[channels.down].axis == 2
