"""The idx files of MNIST and its kin: a magic number, counts, and bytes, compressed with gzip.

Source of the format: LeCun, Cortes and Burges, "The MNIST database of handwritten digits".
"""

from __future__ import annotations

import gzip
import struct
import zlib
from pathlib import Path

import torch
from torch import Tensor

from linearize.data.batches import Images
from linearize.errors import DataError

__all__ = ["looks_like_idx", "read_idx"]

_DOWNLOAD_AGAIN = "Download the file again."


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
        content = gzip.decompress(path.read_bytes())
    except (EOFError, zlib.error) as error:
        raise DataError(str(path), "is truncated or damaged", _DOWNLOAD_AGAIN) from error
    except gzip.BadGzipFile as error:
        raise DataError(str(path), "is no gzip file", _DOWNLOAD_AGAIN) from error
    except OSError as error:
        raise DataError(str(path), f"cannot be read ({error.strerror})", "Check its permissions.") from error
    header = 4 * (1 + dims)
    if len(content) < header:
        raise DataError(str(path), f"holds {len(content)} bytes, too few for a header", _DOWNLOAD_AGAIN)
    magic, *shape = struct.unpack(f">{1 + dims}I", content[:header])
    if magic != 0x0800 + dims:
        found = f"starts with {magic} instead of {0x0800 + dims}"
        raise DataError(str(path), found, "Pass the idx files of MNIST or Fashion-MNIST.")
    values = torch.frombuffer(bytearray(content), dtype=torch.uint8)[header:]
    expected = 1
    for size in shape:
        expected *= size
    if len(values) != expected or not expected:
        found = f"holds {len(values)} values where its header promises {expected}"
        raise DataError(str(path), found, _DOWNLOAD_AGAIN)
    return values.view(*shape)
