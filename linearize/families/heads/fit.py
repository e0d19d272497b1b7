"""Which heads go, and the projection refitted on those that stay: the closed form of channels, one unit at a time.

Shape letters: U units, g features of a unit, K units that stay, O outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from linearize.algebra.regression import Fit, fit, square_root
from linearize.algebra.removal import Removal, removal_order
from linearize.families.channels.editable import bias_of, matrix
from linearize.families.heads.place import Heads

__all__ = ["HeadCurve", "curve_of"]

_RIDGE = 1e-3  # as for channels


@dataclass
class HeadCurve:
    """The statistics of an attention with its projection: inputs are in the order of units.

    Attributes:
        place: observed.
        weight, bias: of the projection, (O, U * g) and (O,), float64.
        biased: whether the projection has a bias; one that has none gets none.
        ridge: of every least-squares problem here.
    """

    place: Heads
    weight: Tensor
    bias: Tensor
    biased: bool
    ridge: float

    @cached_property
    def covariance(self) -> Tensor:
        """The covariance of the heads, unit by unit; moments about zero where no constant may be fitted."""
        rows = self.place.rows
        if rows is None:
            raise ValueError("no batch reached it")
        whole = rows.covariance if self.biased else rows.covariance + rows.mean.outer(rows.mean)
        order = self.place.columns(range(self.place.units)).to(whole.device)
        return whole[order][:, order]

    @cached_property
    def mean(self) -> Tensor:
        """The mean of the heads, unit by unit."""
        rows = self.place.rows
        if rows is None:
            raise ValueError("no batch reached it")
        order = self.place.columns(range(self.place.units)).to(rows.mean.device)
        return rows.mean[order] * float(self.biased)

    @cached_property
    def root(self) -> Tensor:
        """Square root of the metric, (O, O); as for channels, a little in every direction."""
        found = self.place.sensitivity
        size = len(self.weight)
        if found is None or not self.place.samples or not bool(found.diagonal().sum() > 0):
            return torch.eye(size, dtype=torch.float64, device=self.weight.device)
        metric = found / self.place.samples
        eye = torch.eye(size, dtype=metric.dtype, device=metric.device)
        return square_root(metric + eye * metric.diagonal().mean() * 1e-3)

    @cached_property
    def removal(self) -> Removal:
        """The order in which units go."""
        return removal_order(self.covariance, self.root @ self.weight, group=self.place.group, ridge=self.ridge)

    def gone(self, keep: int) -> tuple[int, ...]:
        """The units that go if so many stay, ascending."""
        count = self.place.units - keep
        return tuple(sorted(int(unit) for unit in self.removal.order[:count]))

    def loss(self, keep: int) -> float:
        """The error of the model's output that it is predicted to cause."""
        return float(self.removal.loss[self.place.units - keep])

    def refitted(self, gone: Sequence[int]) -> Fit:
        """The projection on the units that stay, in their order."""
        group = self.place.group
        keep = torch.tensor([unit for unit in range(self.place.units) if unit not in set(gone)], dtype=torch.long)
        features = (keep[:, None] * group + torch.arange(group)).flatten().to(self.weight.device)
        return fit(
            self.covariance, self.mean, self.weight, self.bias, inputs=0, keep=features, root=self.root,
            ridge=self.ridge,
        )  # fmt: skip


def curve_of(model: nn.Module, place: Heads) -> HeadCurve:
    """The curve of an observed attention, with the weights that it has in a model."""
    order = place.columns(range(place.units))
    device = place.rows.mean.device if place.rows is not None else torch.device("cpu")
    weight = matrix(model, place.out)[:, order.to(model.get_submodule(place.name).weight.device)]  # type: ignore[arg-type]
    bias = bias_of(model, place.out, len(weight))
    scarce = place.out.total / max(1, place.rows.count if place.rows is not None else 0)
    ridge = _RIDGE if scarce < 1 else 0.1 * scarce
    biased = model.get_submodule(place.name)._parameters.get("bias") is not None
    return HeadCurve(place, weight.to(device), bias.to(device), biased, ridge)
