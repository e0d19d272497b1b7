"""The idx files of MNIST and its kin: a magic number, counts, and bytes, compressed with gzip.

Source of the format: LeCun, Cortes and Burges, "The MNIST database of handwritten digits".
"""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path

import torch
from torch import Tensor

from linearize.data.batches import Images
from linearize.errors import DataError

__all__ = ["looks_like_idx", "read_idx"]

_DOWNLOAD_AGAIN = "Download the file again."
_RATIO = 100  # MNIST compresses to a fifth; what promises far more is made to fill memories
_PIECE = 2**20


def looks_like_idx(folder: Path) -> bool:
    """True if any idx file lies in the folder."""
    return any(folder.glob("*-idx?-ubyte.gz"))


def read_idx(folder: Path) -> tuple[Images, Images, list[str]]:
    """Training and test images of a folder, and the names of the classes, which are numbers.

    Raises:
        DataError: a file is missing, damaged, of another format, or does not fit the others.
    """
    train, test = (_read_pair(folder, prefix) for prefix in ("train", "t10k"))
    if train.shape != test.shape:
        found = f"images of {test.shape[1:]} for testing, but of {train.shape[1:]} for training"
        raise DataError(str(folder), f"found {found}", "Pass a folder that holds one data set.")
    count = int(train.labels.max()) + 1
    if len(train.labels.unique()) < 2:
        raise DataError(str(folder), "found images of one class only", "Pass data of two classes or more.")
    if int(test.labels.max()) >= count:
        found = f"found class {int(test.labels.max())} in the test images only"
        raise DataError(str(folder), found, "Pass data whose training images show every class.")
    return train, test, [str(label) for label in range(count)]


def _read_pair(folder: Path, prefix: str) -> Images:
    pixels = _read_file(folder / f"{prefix}-images-idx3-ubyte.gz", dims=3)
    labels = _read_file(folder / f"{prefix}-labels-idx1-ubyte.gz", dims=1)
    if len(pixels) != len(labels):
        found = f"found {len(pixels)} images but {len(labels)} labels for {prefix!r}"
        raise DataError(str(folder), found, "Pass files that belong together.")
    return Images.of(pixels[:, None], labels.long())


def _read_file(path: Path, dims: int) -> Tensor:
    """The bytes of one idx file in their shape."""
    if not path.is_file():
        raise DataError(str(path), "does not exist", "All four idx .gz files must lie in the folder.")
    try:
        with gzip.open(path) as file:
            shape = _shape(path, file.read(4 * (1 + dims)), dims)
            values = bytearray(math.prod(shape))
            held = _fill(values, file)
            rest = file.read(1)
    except (EOFError, zlib.error) as error:
        raise DataError(str(path), "is truncated or damaged", _DOWNLOAD_AGAIN) from error
    except gzip.BadGzipFile as error:
        raise DataError(str(path), "is no gzip file", _DOWNLOAD_AGAIN) from error
    except OSError as error:
        raise DataError(str(path), f"cannot be read ({error.strerror or error})", "Check its permissions.") from error
    if held != len(values) or rest or not values:
        found = f"holds {'more' if rest else held} values where its header promises {len(values)}"
        raise DataError(str(path), found, _DOWNLOAD_AGAIN)
    return torch.frombuffer(values, dtype=torch.uint8).view(*shape)


def _fill(values: bytearray, file: gzip.GzipFile) -> int:
    """Read as many bytes as there is room for; how many there were."""
    view, held = memoryview(values), 0
    while held < len(values) and (count := file.readinto(view[held : held + _PIECE])):
        held += count
    return held


def _shape(path: Path, header: bytes, dims: int) -> list[int]:
    """What the header promises, if the file can hold that much."""
    if len(header) < 4 * (1 + dims):
        raise DataError(str(path), f"holds {len(header)} bytes, too few for a header", _DOWNLOAD_AGAIN)
    magic, *shape = struct.unpack(f">{1 + dims}I", header)
    if magic != 0x0800 + dims:
        found = f"starts with {magic} instead of {0x0800 + dims}"
        raise DataError(str(path), found, "Pass the idx files of MNIST or Fashion-MNIST.")
    size = path.stat().st_size
    if math.prod(shape) > _RATIO * size:
        found = f"holds {size} bytes, and its header promises {math.prod(shape)} values"
        raise DataError(str(path), found, "No images compress that well: download the file again.")
    return shape
