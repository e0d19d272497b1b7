"""The loss of a site as a function of the number of removed channels, and the new weights for a choice.

Shape letters: I inputs, C channels, g features per channel, K channels that stay, O outputs, r rank of the skip.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from linearize.algebra.regression import conditional, fit, rank_losses, square_root
from linearize.algebra.removal import Removal, removal_order
from linearize.families.channels.apply import Edit, edit_for
from linearize.families.channels.observation import Observation
from linearize.families.option import SiteChoice

__all__ = ["Curve", "curve_of", "levels", "step_of"]

# Shares of the channels that stay, as options: finer where little is left, since there each channel counts more.
_SHARES = (7 / 8, 3 / 4, 5 / 8, 1 / 2, 7 / 16, 3 / 8, 5 / 16, 1 / 4, 3 / 16, 1 / 8, 3 / 32, 1 / 16, 1 / 32)
_STEP = 8
_RIDGE = 1e-3  # relative to each feature's variance: held-out data prefers it neither much smaller nor larger


@dataclass
class Curve:
    """A site's statistics, and the weights to refit.

    Attributes:
        observation: what calibration found.
        weight, bias: of the consumers, (O, C * g) and (O,), float64.
        ridge: of every least-squares problem here.
        stock: only what ordinary layers of narrower widths can do: no skip, and no bias that was not there.
        last: nobody needs the sums of the observation behind this.
    """

    observation: Observation
    weight: Tensor
    bias: Tensor
    ridge: float
    stock: bool = False
    last: bool = False

    @property
    def channels(self) -> int:
        """C, the number of channels."""
        return self.observation.site.channels

    @property
    def largest_rank(self) -> int:
        """The rank of a full skip; 0 where no skip is possible."""
        return 0 if self.stock else min(self.observation.inputs, len(self.weight))

    @cached_property
    def root(self) -> Tensor:
        """Square root of the metric, (O, O)."""
        return square_root(self.observation.metric)

    @cached_property
    def _unbiased(self) -> bool:
        """True if no constant may be fitted: then moments about zero take the place of the covariance."""
        return self.stock and any(c.module._parameters.get("bias") is None for c in self.observation.consumers)

    @cached_property
    def covariance(self) -> Tensor:
        """The covariance of (x, h)."""
        rows = self.observation.rows
        found = rows.taken() if self.last else rows.covariance
        if self._unbiased:
            found += rows.mean.outer(rows.mean)
        return found

    @cached_property
    def mean(self) -> Tensor:
        """The mean of (x, h)."""
        return self.observation.rows.mean * (0.0 if self._unbiased else 1.0)

    @cached_property
    def dropped(self) -> Removal:
        """The order in which channels are removed if only the other channels make up for them."""
        hidden = self.covariance[self.observation.inputs :, self.observation.inputs :]
        return removal_order(hidden, self.root @ self.weight, group=self.observation.group, ridge=self.ridge)

    @cached_property
    def skipped(self) -> Removal:
        """The order in which channels are removed beside a full skip: by what x does not explain of them."""
        inputs = self.observation.inputs
        given = torch.arange(inputs, device=self.weight.device)
        of = torch.arange(inputs, len(self.covariance), device=self.weight.device)
        hidden = conditional(self.covariance, given, of, self.ridge)
        return removal_order(hidden, self.root @ self.weight, group=self.observation.group, ridge=self.ridge)

    def keep(self, choice: SiteChoice) -> Tensor:
        """The channels that stay, by index, ascending (K,)."""
        return (self.skipped if self._full(choice) else self.dropped).keep(choice.keep)

    def _full(self, choice: SiteChoice) -> bool:
        return choice.rank > 0 and choice.rank == self.largest_rank

    def choices(self, widths: list[int], ranks: tuple[int, ...]) -> Iterator[tuple[SiteChoice, float]]:
        """Every choice worth pricing, with its predicted loss."""
        for width in widths:
            if width:
                yield (
                    SiteChoice(self.observation.site.name, width),
                    float(self.dropped.loss[self.channels - width]),
                )
        name, full = self.observation.site.name, self.largest_rank
        if not full:
            return
        for width in widths:
            if self.channels - width >= full:
                loss = float(self.skipped.loss[self.channels - width])
                for form in ("merged", "factored") if width else ("vanished",):
                    yield SiteChoice(name, width, full, form), loss
        few = [width for width in widths if width <= self.channels // 2]
        group = self.observation.group
        order = (self.dropped.order[:, None] * group + torch.arange(group, device=self.weight.device)).flatten()
        losses = rank_losses(
            self.covariance, self.weight, order, [width * group for width in few], self.observation.inputs, self.root,
            self.ridge,
        )  # fmt: skip
        for width in few:
            least, values = losses[width * group]
            for rank in ranks:
                if 0 < rank < full and rank <= self.channels - width:
                    yield SiteChoice(name, width, rank), least + float(values[rank:].sum())

    def edit(self, model: nn.Module, choice: SiteChoice, keep: Tensor | None = None) -> Edit:
        """The closed form of a choice. `keep` overrides which channels stay."""
        kept = self.keep(choice) if keep is None else keep
        group = self.observation.group
        features = (kept[:, None] * group + torch.arange(group, device=kept.device)).flatten()
        found = fit(
            self.covariance,
            self.mean,
            self.weight,
            self.bias,
            inputs=self.observation.inputs,
            keep=features,
            rank=None if self._full(choice) else choice.rank,
            root=self.root,
            ridge=self.ridge,
        )
        return edit_for(model, self.observation, kept, found)


def curve_of(model: nn.Module, observation: Observation, *, stock: bool = False, last: bool = False) -> Curve:
    """The curve of a site, from one observation of it in `model`."""
    features = len(observation.rows.mean)
    scarce = features / max(1, observation.rows.count)
    ridge = _RIDGE if scarce < 1 else 0.1 * scarce  # the covariance has no full rank: trust it the less
    return Curve(observation, observation.weight(model), observation.bias(model), ridge, stock, last)


def levels(channels: int, round_to: int | None = None) -> list[int]:
    """Numbers of channels that may stay, less than all, falling; 0 makes the whole site linear.

    Args:
        channels: of the site.
        round_to: they are multiples of this; None takes 8, or less at a site that would have next to no choice.

    Examples:
        >>> levels(64)
        [56, 48, 40, 32, 28, 24, 20, 16, 12, 8, 4, 0]
        >>> levels(64, 16)
        [48, 32, 16, 0]
    """
    step = step_of(channels, round_to)
    found = {max(step, round(share * channels / step) * step) for share in _SHARES}
    return [*sorted((width for width in found if width < channels), reverse=True), 0]


def step_of(channels: int, round_to: int | None) -> int:
    """The number that widths are multiples of: as asked, or 8, or less at a site that would have next to no choice.

    Examples:
        >>> step_of(64, None), step_of(256, None), step_of(64, 16)
        (4, 8, 16)
    """
    return max(1, min(_STEP, channels // 16)) if round_to is None else round_to
