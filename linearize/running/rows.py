"""Turn activations and gradients into rows, one for each position that a linear map reads or writes.

Shape letters: B samples, T positions, R rows, C channels, g features per channel, O outputs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["Wanted", "batched", "gradient_rows", "outliers_down", "patches_of", "row_weights", "rows_of"]

_MANY, _FEW = 64, 8  # positions sampled per image where patches are read: neighbours tell the same
_PER_FEATURE = 20  # rows that are enough, but for
_CHEAP = 20_000  # rows that cost next to nothing
_FAR = 3.0  # times the usual size of a row from which on it counts less


def rows_of(x: Tensor, dims: int, mask: Tensor | None) -> Tensor:
    """Rows (R, channels), without those that a mask (B, T) marks as padding."""
    x = x.movedim(-1 - dims, -1)
    if mask is not None:
        if x.shape[:-1] == mask.shape:
            return x[mask.bool()]
        if x.shape[:-1] == (mask.numel(),):
            return x[mask.flatten().bool()]
    return x.reshape(-1, x.shape[-1])


def batched(x: Tensor, dims: int) -> Tensor:
    """The input as (B, C, *positions). An image without a batch axis becomes a batch of one.

    Examples:
        >>> batched(torch.zeros(3, 8, 8), 2).shape, batched(torch.zeros(5, 3), 0).shape
        (torch.Size([1, 3, 8, 8]), torch.Size([5, 3]))
    """
    return x[None] if dims and x.dim() == dims + 1 else x


def gradient_rows(dims: Sequence[int], gradients: Mapping[int, Tensor], mask: Tensor | None) -> Tensor | None:
    """Gradients at the rows of all consumers' outputs, (R, O); None if a consumer got none.

    Args:
        dims: of each consumer, how many dimensions lie behind its channels.
        gradients: by the consumer's index.
        mask: (B, T), where padding is marked.
    """
    if len(gradients) < len(dims):
        return None
    parts = [rows_of(gradients[i], behind, mask) for i, behind in enumerate(dims)]
    return torch.cat(parts, 1) if len({len(part) for part in parts}) == 1 else None


def row_weights(gradient: Tensor | None) -> Tensor | None:
    """Weights of rows. Half of each is the row's own sensitivity, so that important rows count more."""
    if gradient is None:
        return None
    energy = gradient.double().square().sum(1)
    mean = float(energy.mean())
    return 0.5 + 0.5 * energy / mean if mean > 0 and math.isfinite(mean) else None


def outliers_down(x: Tensor) -> Tensor:
    """Weights of rows (R, D): 1, and less for rows that are much longer than most, such as those of first tokens.

    Some tokens of trained decoders are hundreds of times longer than all others; least squares would look at nothing
    else. A row never counts more than one of three times the usual length.

    Examples:
        >>> outliers_down(torch.tensor([[1.0], [1.0], [2.0], [30.0]])).tolist()
        [1.0, 1.0, 1.0, 0.010000000707805157]
    """
    size = x.float().square().sum(1).sqrt()
    usual = _FAR * size.median()
    return (usual / size.clamp_min(1e-30)).clamp(max=1.0).square()


@dataclass(frozen=True)
class Wanted:
    """How many positions of an image to sample. It falls once there are enough rows for the features.

    It depends on the number of the batch, as if all earlier batches had been alike, and not on the rows that were
    really seen. So parts of the data are sampled like the whole.

    Attributes:
        index: of the batch.
        features: F.
    """

    index: int
    features: int

    def of(self, images: int, positions: int) -> int:
        """Positions of each image, given how many images a batch has, and how many positions an image has.

        Examples:
            >>> Wanted(0, 2000).of(16, 196), Wanted(40, 2000).of(16, 196), Wanted(0, 2000).of(16, 9)
            (64, 8, 9)
        """
        before = self.index * images * min(_MANY, positions)
        return min(positions, _FEW if before >= max(_PER_FEATURE * self.features, _CHEAP) else _MANY)


def patches_of(h: Tensor, conv: Any, wanted: Wanted, generator: torch.Generator) -> tuple[Tensor, Tensor, int]:
    """Some of the patches that a spatial consumer reads, (R, C * g), the same random positions of every image.

    Returns:
        The patches, where they are, and how many positions there are.
    """
    found, where, total = [], torch.empty(0), 0
    for some in h.split(8):
        patches = functional.unfold(some, conv.kernel_size, conv.dilation, conv.padding, conv.stride)
        if not total:
            total = patches.shape[2]
            where = torch.randperm(total, generator=generator)[: wanted.of(len(h), total)].to(h.device)
        found.append(patches[:, :, where].transpose(1, 2).flatten(0, 1))
    return torch.cat(found), where, total
