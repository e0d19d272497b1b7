"""Write a fit into a gated model, so that exact collapsing gives the smaller model.

The model keeps its shapes. The consumers get the new columns, and the columns of removed channels are zero. The gates
of removed channels become linear, with slope and intercept 0, and collapsing drops these channels. A linear skip of
rank r uses the places of r removed channels: their rows in the producer become the right factor of the skip, their
columns in the consumer become the left factor, and their gates are linear with slope 1. Then `linearize.collapse` folds
everything exactly into the cheapest form.

Shape letters: I inputs, C channels, g features per channel, K channels that stay, O outputs, r rank of the skip.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from linearize.algebra.regression import Fit
from linearize.families.channels.editable import (
    bias_of,
    consumers_of,
    fold_of,
    matrix,
    write_bias,
    write_columns,
    write_matrix,
)
from linearize.families.channels.observation import Observation
from linearize.families.channels.skip import skip_source
from linearize.gating.gate import ChannelGate, gates

__all__ = ["Edit", "edit_for", "write_edit"]


@dataclass(frozen=True)
class Edit:
    """New values for a site, in float64. Its channels are kept, or carry the skip, or are dropped.

    Attributes:
        site: its name.
        keep: indices of the channels that stay nonlinear, ascending.
        carriers: indices of the channels that carry the skip, (r,).
        weights, biases: of each consumer, (O_j, C * g) and (O_j,); the weights for the site's channels.
        before: the biases that these replace.
        source: the whole weight (outputs, I * taps) of the producer, with the skip's rows in it; None without a skip.
        slope, intercept: of the gate, (C,).
    """

    site: str
    keep: Tensor
    carriers: Tensor
    weights: tuple[Tensor, ...]
    biases: tuple[Tensor, ...]
    source: Tensor | None
    slope: Tensor
    intercept: Tensor
    before: tuple[Tensor, ...] = ()
    measure: Callable[[], float] = field(default=lambda: 0.0, repr=False, compare=False)

    @property
    def loss(self) -> float:
        """What it costs, as predicted."""
        return self.measure()

    @property
    def memory(self) -> float:
        """Bytes that the sums take."""
        held = [
            *self.weights,
            *self.biases,
            self.slope,
            self.intercept,
            *([] if self.source is None else [self.source]),
        ]
        return float(sum(tensor.nbytes for tensor in held))

    def linear(self) -> Tensor:
        """Mask of the channels that are no longer nonlinear: bool (C,)."""
        mask = torch.ones_like(self.slope, dtype=torch.bool)
        mask[self.keep] = False
        return mask


def edit_for(model: nn.Module, observation: Observation, keep: Tensor, found: Fit) -> Edit:
    """The edit that makes a site compute a fit. Nothing is written yet.

    Args:
        model: gated, with its own weights at this site.
        observation: of the site.
        keep: indices of the channels that stay, ascending (K,).
        found: fitted with the features of these channels.
    """
    site, group = observation.site, observation.group
    channels, rank = site.channels, found.left.shape[1]
    device = found.weight.device
    gone = torch.ones(channels, dtype=torch.bool, device=device)
    gone[keep] = False
    features = _features(keep, group)
    weight = found.weight.new_zeros(observation.outputs, channels * group)
    weight[:, features] = found.weight
    bias = found.bias.clone()
    slope, intercept = torch.zeros(2, channels, dtype=torch.float64, device=device).unbind()
    carriers, source = keep.new_zeros(0), None
    start = skip_source(model, site)
    if rank and start is not None:
        port = start.port
        scale, shift = fold_of(model, () if site.gated_unit else site.folds, channels)
        size = scale.abs().masked_fill(~gone, -1)
        carriers = size.topk(rank).indices.sort().values
        own = bias_of(model, port, port.total)[port.start : port.stop]
        source = matrix(model, port)
        rows = port.start + carriers
        source[rows] = 0
        source[rows[:, None], start.columns().to(rows.device)] = found.right / scale[carriers, None]
        weight[:, carriers * group + group // 2] = found.left  # the middle tap
        if site.gated_unit:  # the carried value is up(x) itself, with its bias: the consumer takes that off again
            intercept[carriers] = 1
            bias = bias - found.left @ own[carriers]
        else:
            slope[carriers] = 1
            intercept[carriers] = -(scale * own + shift)[carriers]
    sizes = [consumer.outputs for consumer in observation.consumers]
    parts = weight.split(sizes), bias.split(sizes)
    before = observation.bias(model).split(sizes)
    return Edit(site.name, keep, carriers, *parts, source, slope, intercept, before, lambda: found.loss)


def _features(channels: Tensor, group: int) -> Tensor:
    """Indices of the features of some channels."""
    return (channels[:, None] * group + torch.arange(group, device=channels.device)).flatten()


@torch.no_grad()
def write_edit(model: nn.Module, edit: Edit) -> None:
    """Write an edit into a gated model, in place: weights, biases and the gate."""
    gate: ChannelGate = gates(model)[edit.site]
    site = gate.site
    if site is None:
        return
    values = zip(consumers_of(model, site), edit.weights, edit.biases, edit.before, strict=True)
    for consumer, weight, bias, before in values:
        write_columns(model, consumer, weight)
        # Other branches of a concatenation may have changed the bias since.
        moved = bias_of(model, consumer.port, consumer.outputs) - before
        write_bias(model, consumer.port, bias if consumer.port.whole else bias + moved)
    start = skip_source(model, site)
    if edit.source is not None and start is not None:
        write_matrix(model, start.port, edit.source)
    gate.slope.copy_(edit.slope)
    gate.intercept.copy_(edit.intercept)
    gate.linearize_(edit.linear().to(gate.frozen.device))
