"""Batches of labelled images: in memory or read when needed, in an order that seed and epoch alone decide.

Shape letters: N images, C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from linearize.errors import UsageError

__all__ = ["Batches", "Images", "Transform"]


@dataclass(frozen=True)
class Images:
    """Labelled images of one shape.

    Attributes:
        read: gives the images of some indices as bytes, (N, C, H, W).
        labels: class of every image, (N,).
        shape: (C, H, W).
        chosen: the indices in use, (N,).
    """

    read: Callable[[Tensor], Tensor]
    labels: Tensor
    shape: tuple[int, int, int]
    chosen: Tensor

    @classmethod
    def of(cls, pixels: Tensor, labels: Tensor) -> Images:
        """All images of a tensor of bytes (N, C, H, W)."""
        channels, height, width = pixels.shape[1:]
        return cls(pixels.__getitem__, labels, (channels, height, width), torch.arange(len(labels)))

    def __len__(self) -> int:
        return len(self.chosen)

    def take(self, chosen: Tensor) -> Images:
        """Only the images at these positions."""
        return replace(self, chosen=self.chosen[chosen])

    def first(self, limit: int | None) -> Images:
        """At most `limit` images, spread evenly over all of them."""
        if limit is None or limit >= len(self):
            return self
        return self.take(torch.arange(limit) * len(self) // limit)


@dataclass(frozen=True)
class Transform:
    """Turn bytes (N, C, H, W) into inputs of a model: its size, its channels, its normalisation."""

    size: tuple[int, int]
    channels: int
    mean: tuple[float, ...] = (0.5,)
    std: tuple[float, ...] = (0.5,)

    def __post_init__(self) -> None:
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) not in (1, self.channels):
                expected = f"Pass one number, or one for each of the {self.channels} channels."
                raise UsageError(name, f"found {len(values)} numbers", expected)
        if min(self.std) <= 0:
            raise UsageError("std", f"found {min(self.std)}", "Pass positive numbers.")

    def __call__(self, pixels: Tensor) -> Tensor:
        """Float32 images (N, channels, *size)."""
        x = pixels.float() / 255
        if x.shape[1] != self.channels:
            x = x.mean(1, keepdim=True).expand(-1, self.channels, -1, -1)
        if tuple(x.shape[2:]) != self.size:
            x = torch.nn.functional.interpolate(x, self.size, mode="bilinear", antialias=True, align_corners=False)
        mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (self.mean, self.std))
        return (x - mean) / std


class Batches:
    """Batches that can be read several times. If shuffled, each pass is an epoch, and (seed, epoch) decides its order.

    `set_epoch` chooses the epoch of the next pass, so that a resumed training gets the same batches.

    Examples:
        >>> images = Images.of(torch.zeros(5, 1, 2, 2, dtype=torch.uint8), torch.arange(5))
        >>> batches = Batches(images, 2, Transform((2, 2), 1), shuffle=True)
        >>> len(batches), [tuple(x.shape) for x, y in batches]
        (2, [(2, 1, 2, 2), (2, 1, 2, 2)])
    """

    def __init__(
        self,
        images: Images,
        batch_size: int,
        transform: Transform,
        *,
        seed: int = 0,
        shuffle: bool = False,
        keywords: Sequence[str] | None = None,
    ) -> None:
        self.images = images
        self.batch_size = batch_size
        self.transform = transform
        self.seed = seed
        self.shuffle = shuffle
        self.keywords = keywords
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next pass, counted from 0."""
        self._epoch = epoch

    def __len__(self) -> int:
        whole, rest = divmod(len(self.images), self.batch_size)
        # In training, a last batch of few images makes a noisy step and is too small for batch statistics.
        return whole if self.shuffle and whole else whole + (rest > 0)

    def __iter__(self) -> Iterator[Any]:
        order = self._order()
        for position in range(len(self)):
            chosen = order[position * self.batch_size : (position + 1) * self.batch_size]
            pixels, labels = self.images.read(chosen), self.images.labels[chosen]
            batch = (self.transform(pixels), labels)
            yield batch if self.keywords is None else dict(zip(self.keywords, batch, strict=True))

    def _order(self) -> Tensor:
        if not self.shuffle:
            return self.images.chosen
        # A prime keeps the seeds of all (seed, epoch) apart, far beyond any number of epochs.
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self._epoch)
        self._epoch += 1
        return self.images.chosen[torch.randperm(len(self.images), generator=generator)]
