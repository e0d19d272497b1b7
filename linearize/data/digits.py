"""The handwritten digits that come with scikit-learn."""

from __future__ import annotations

import torch

from linearize.data.batches import Images
from linearize.errors import DataError

__all__ = ["read_digits"]


def read_digits() -> tuple[Images, Images, list[str]]:
    """1797 digits of 8 x 8 pixels in 10 classes; a fifth of them, always the same, for testing.

    Source: Alpaydin and Kaynak, "Optical recognition of handwritten digits", UCI repository, 1998.

    Raises:
        DataError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataError("digits", "scikit-learn is not installed", "pip install 'linearize[data]'") from error
    found = load_digits()
    pixels = (torch.from_numpy(found.images)[:, None] * (255 / 16)).round().to(torch.uint8)
    labels = torch.from_numpy(found.target).long()
    # Neighbours in the file are by the same writer: a random fifth mixes writers, as the training set does.
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    every = Images.of(pixels, labels)
    held = len(labels) // 5
    return every.take(order[held:]), every.take(order[:held]), [str(digit) for digit in range(10)]
