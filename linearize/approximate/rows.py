"""From activations and gradients to rows: one for each position that a map reads or writes.

Shape letters: B samples, T positions, R rows, C channels, g features per channel, O outputs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from linearize.approximate.editable import Consumer

__all__ = ["batched", "gradient_rows", "patches_of", "positions_for", "row_weights", "rows_of"]

_MANY, _FEW = 64, 8  # positions sampled per image where patches are read: neighbours tell the same
_PER_FEATURE = 20  # rows that are enough, but for
_CHEAP = 20_000  # rows that cost next to nothing


def rows_of(x: Tensor, dims: int, mask: Tensor | None) -> Tensor:
    """(R, channels), without the rows that a mask (B, T) marks as padding."""
    x = x.movedim(-1 - dims, -1)
    if mask is not None:
        if x.shape[:-1] == mask.shape:
            return x[mask.bool()]
        if x.shape[:-1] == (mask.numel(),):
            return x[mask.flatten().bool()]
    return x.reshape(-1, x.shape[-1])


def batched(x: Tensor, dims: int) -> Tensor:
    """(B, C, *positions): an image without a batch axis, which convolutions take, too, is a batch of one.

    Example:
        >>> batched(torch.zeros(3, 8, 8), 2).shape, batched(torch.zeros(5, 3), 0).shape
        (torch.Size([1, 3, 8, 8]), torch.Size([5, 3]))
    """
    return x[None] if dims and x.dim() == dims + 1 else x


def gradient_rows(consumers: Sequence[Consumer], gradients: Mapping[int, Tensor], mask: Tensor | None) -> Tensor | None:
    """Gradients at the rows of all consumers' outputs, (R, O); None if a consumer got none."""
    if len(gradients) < len(consumers):
        return None
    parts = [rows_of(gradients[i], consumer.port.dims, mask) for i, consumer in enumerate(consumers)]
    return torch.cat(parts, 1) if len({len(part) for part in parts}) == 1 else None


def row_weights(gradient: Tensor | None) -> Tensor | None:
    """Half the weight of every row is its own sensitivity: the rows that the output depends on count more."""
    if gradient is None:
        return None
    energy = gradient.double().square().sum(1)
    mean = float(energy.mean())
    return 0.5 + 0.5 * energy / mean if mean > 0 and math.isfinite(mean) else None


def positions_for(rows: int, features: int) -> int:
    """How many positions of an image to sample, given how many rows there are already.

    Example:
        >>> positions_for(0, 2000), positions_for(40_000, 2000)
        (64, 8)
    """
    return _FEW if rows >= max(_PER_FEATURE * features, _CHEAP) else _MANY


def patches_of(h: Tensor, conv: Any, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, int]:
    """Some of the patches that a spatial consumer reads, (R, C * g), the same random `count` positions of every image.

    Returns:
        The patches, where they are, and how many positions there are.
    """
    found, where, total = [], torch.empty(0), 0
    for some in h.split(8):
        patches = functional.unfold(some, conv.kernel_size, conv.dilation, conv.padding, conv.stride)
        if not total:
            total = patches.shape[2]
            where = torch.randperm(total, generator=generator)[:count].to(h.device)
        found.append(patches[:, :, where].transpose(1, 2).flatten(0, 1))
    return torch.cat(found), where, total
