"""Fashion-MNIST, made small: 14 x 14 pixels, a few thousand images, 2, 5 or 10 classes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - as everywhere

import linearize
from benchmarks.papers.training import Task
from linearize.data import load_data
from linearize.running.models import evaluating

__all__ = ["FOLDER", "SIZE", "ImageSet", "image_set", "image_task"]

FOLDER = Path("/usr/share/datasets/fashion-mnist")  # Debian package dataset-fashion-mnist
SIZE = 14
_MEAN, _STD = 0.286, 0.3  # of the pixels, averaged over 2 x 2


@dataclass(frozen=True)
class ImageSet:
    """Images (N, 1, 14, 14), normalised, and their classes (N,)."""

    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor


@cache
def _all(folder: Path) -> ImageSet:
    source = load_data(folder, batch_size=1000)
    found = []
    for batches in (source.train, source.test):
        pairs = list(batches)
        images = torch.cat([images for images, _ in pairs]) * 0.5 + 0.5  # back to [0, 1]
        found += [(F.avg_pool2d(images, 2) - _MEAN) / _STD, torch.cat([labels for _, labels in pairs])]
    return ImageSet(*found)


def image_set(folder: Path, classes: int, train: int, test: int) -> ImageSet:
    """The first classes, so many images of them to train and to test on."""
    whole = _all(folder)

    def some(images: Tensor, labels: Tensor, count: int) -> tuple[Tensor, Tensor]:
        held = (labels < classes).nonzero().flatten()[:count]
        return images[held], labels[held]

    return ImageSet(*some(whole.train, whole.train_labels, train), *some(whole.test, whole.test_labels, test))


def image_task(make: Callable[[], nn.Module], images: ImageSet, seed: int, *, lr: float, batch: int = 64) -> Task:
    """Classification by a network whose weights and whose order of images the seed decides."""
    torch.manual_seed(seed)
    model = linearize.convert(make(), images.train[:2])
    count = len(images.train)

    def pick(step: int) -> tuple[Tensor, Tensor]:
        each = count // batch
        order = _order(count, seed, step // each)
        chosen = order[step % each * batch :][:batch]
        return images.train[chosen], images.train_labels[chosen]

    def score(trained: nn.Module) -> dict[str, float]:
        with evaluating(trained):
            outputs = torch.cat([trained(part) for part in images.test.split(250)])
        return {"accuracy": float((outputs.argmax(1) == images.test_labels).double().mean())}

    def loss(trained: nn.Module, held: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(trained(held[0]), held[1])

    parts = zip(images.train[:512].split(128), images.train_labels[:512].split(128), strict=True)
    return Task(model, pick, loss, score, list(parts), lr)


@cache
def _order(count: int, seed: int, epoch: int) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(1000 * seed + epoch))
