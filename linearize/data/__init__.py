"""Data sets for the command line and the demo: handwritten digits, idx files, folders of images; and text."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from linearize.data.batches import Batches, Images, Transform
from linearize.data.digits import read_digits
from linearize.data.files import looks_like_classes, read_folder
from linearize.data.idx import looks_like_idx, read_idx
from linearize.data.text import TextBatches, TextSource, load_text
from linearize.data.text_quality import TextQuality
from linearize.errors import DataError, UsageError

__all__ = [
    "Batches",
    "DataSource",
    "TextBatches",
    "TextQuality",
    "TextSource",
    "Transform",
    "load_data",
    "load_text",
]


@dataclass(frozen=True)
class DataSource:
    """Labelled images, ready for a model.

    Attributes:
        name: where they come from.
        train, test: batches that can be read several times; `train` in another order each epoch, `test` in the same.
        classes: names of the classes; a label is an index into them.
        in_chans, size: channels and (height, width) of the images in the batches.
    """

    name: str
    train: Batches
    test: Batches
    classes: tuple[str, ...]
    in_chans: int
    size: tuple[int, int]

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.classes)


def load_data(
    source: str | os.PathLike[str],
    *,
    size: int | tuple[int, int] | None = None,
    in_chans: int | None = None,
    mean: Sequence[float] = (0.5,),
    std: Sequence[float] = (0.5,),
    batch_size: int = 64,
    seed: int = 0,
    limit: int | None = None,
    keywords: tuple[str, str] | None = None,
) -> DataSource:
    """Open a data source.

    Args:
        source: "digits" (1797 handwritten digits of 8 x 8 pixels in scikit-learn, no download), a folder
            with the four idx .gz files of MNIST or Fashion-MNIST, or a folder with a subfolder of images per
            class. These subfolders may be inside "train" and "test" (or "val"); otherwise every fifth image is
            kept for testing.
        size: height and width that the model takes; None keeps the source's own (224 for image files).
        in_chans: channels that the model takes; None keeps the source's own (3 for image files).
        mean: of each channel, for values in [0, 1]; one number serves all channels.
        std: the standard deviation of each channel, in the same form.
        batch_size: number of images in a batch. In `train`, a smaller last batch is left out.
        seed: of the order of the training images.
        limit: largest number of images for training, and for testing, spread over the whole source.
        keywords: names of the images and of the labels if the model takes keyword arguments, for example
            ("pixel_values", "labels"); None gives pairs (images, labels).

    Returns:
        A `DataSource`.

    Raises:
        DataError: missing, empty, damaged, or of fewer than two classes.
        UsageError: a size or number out of range.

    Examples:
        >>> digits = load_data("digits", size=16, batch_size=100)
        >>> images, labels = next(iter(digits.test))
        >>> tuple(images.shape), digits.num_classes
        ((100, 1, 16, 16), 10)
    """
    for name, number in (("batch_size", batch_size), ("limit", 1 if limit is None else limit)):
        if number < 1:
            raise UsageError(name, f"found {number}", "Pass a number of at least 1.")
    wanted = (size, size) if isinstance(size, int) else size
    if wanted is not None and min(wanted) < 1:
        raise UsageError("size", f"found {size}", "Pass a height and a width of at least 1.")
    train, test, classes = _read(source, wanted)
    found_chans, found_size = train.shape[0], (train.shape[1], train.shape[2])
    transform = Transform(wanted or found_size, in_chans or found_chans, tuple(mean), tuple(std))
    return DataSource(
        os.fspath(source),
        Batches(train.first(limit), batch_size, transform, seed=seed, shuffle=True, keywords=keywords),
        Batches(test.first(limit), batch_size, transform, keywords=keywords),
        tuple(classes),
        transform.channels,
        transform.size,
    )


def _read(source: str | os.PathLike[str], size: tuple[int, int] | None) -> tuple[Images, Images, list[str]]:
    if os.fspath(source) == "digits":
        return read_digits()
    folder = Path(source)
    remedy = 'Pass "digits", a folder of idx .gz files, or a folder with one subfolder of images per class.'
    if not folder.exists():
        raise DataError(str(folder), "does not exist", remedy)
    if not folder.is_dir():
        raise DataError(str(folder), "is a file, not a folder", remedy)
    if looks_like_idx(folder):
        return read_idx(folder)
    if looks_like_classes(folder):
        return read_folder(folder, size or (224, 224))
    raise DataError(str(folder), "holds neither idx .gz files nor folders of images", remedy)
