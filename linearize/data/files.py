"""Images in a folder with one subfolder per class."""

from __future__ import annotations

import warnings
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from linearize.data.batches import Images
from linearize.errors import DataError

__all__ = ["SUFFIXES", "looks_like_classes", "read_folder"]

SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
# By content, whatever the name: others of the library start programs (Ghostscript for EPS).
_DECODERS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
_LONGEST_SIDE = 2**16
_TEST_NAMES = ("test", "val", "validation")


def looks_like_classes(folder: Path) -> bool:
    """True if there are subfolders."""
    return any(_subfolders(folder))


def read_folder(folder: Path, size: tuple[int, int]) -> tuple[Images, Images, list[str]]:
    """Images for training and testing, read when they are needed, and the names of the classes.

    Folders named "train" and "test" (or "val") hold the classes of each; otherwise every fifth image of each
    class, in order of names, is for testing.

    Args:
        folder: where the subfolders are.
        size: height and width; images are scaled to cover it and cut around their centre.

    Raises:
        DataError: no images, one class only, a class without training images, or pillow is not installed.
    """
    train_folder = folder / "train"
    test_folder = next((folder / name for name in _TEST_NAMES if (folder / name).is_dir()), None)
    if train_folder.is_dir() and test_folder is not None:
        train = _files(train_folder)
        test = _files(test_folder)
    else:
        every = _files(train_folder if train_folder.is_dir() else folder)
        train = {name: [f for i, f in enumerate(files) if i % 5 != 4] for name, files in every.items()}
        test = {name: files[4::5] for name, files in every.items()}
    classes = sorted(train)
    _check(folder, train, test)
    return _images(train, classes, size), _images(test, classes, size), classes


def _check(folder: Path, train: dict[str, list[Path]], test: dict[str, list[Path]]) -> None:
    if not any(train.values()):
        raise DataError(str(folder), "found no image", f"Supported are {', '.join(sorted(SUFFIXES))}.")
    if len(train) < 2:
        remedy = "Pass a folder with one subfolder of images for each of two classes or more."
        raise DataError(str(folder), f"found one class only, {next(iter(train))!r}", remedy)
    for name, files in train.items():
        if not files:
            raise DataError(str(folder / name), "found no image", "Add images of this class or remove it.")
    unknown = sorted(set(test) - set(train))
    if unknown:
        found = f"found class {unknown[0]!r} for testing but not for training"
        raise DataError(str(folder), found, "Use the same subfolders in both.")
    if not any(test.values()):
        remedy = "Add a folder 'test', or at least five images to a class."
        raise DataError(str(folder), "found no image for testing", remedy)


def _subfolders(folder: Path) -> list[Path]:
    return sorted(entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _files(folder: Path) -> dict[str, list[Path]]:
    """Image files of every class."""
    return {
        sub.name: sorted(f for f in sub.rglob("*") if f.suffix.lower() in SUFFIXES and f.is_file())
        for sub in _subfolders(folder)
    }


def _images(files: dict[str, list[Path]], classes: list[str], size: tuple[int, int]) -> Images:
    paths = [path for name in classes for path in files.get(name, [])]
    labels = [position for position, name in enumerate(classes) for _ in files.get(name, [])]
    read = partial(_read_images, paths, size)
    return Images(read, torch.tensor(labels), (3, *size), torch.arange(len(paths)))


def _read_images(paths: list[Path], size: tuple[int, int], chosen: Tensor) -> Tensor:
    """Images of some indices as bytes (N, 3, H, W)."""
    return torch.stack([_read_image(paths[index], size) for index in chosen.tolist()])


def _read_image(path: Path, size: tuple[int, int]) -> Tensor:
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise DataError(str(path), "pillow is not installed", "pip install 'linearize[data]'") from error
    try:
        with warnings.catch_warnings():
            # The library's own bound on pixels, as an error: a small file may unpack to gigabytes.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=_DECODERS) as image:
                if max(image.size) > _LONGEST_SIDE:  # each row of an image takes memory of its own
                    raise ValueError(f"it has {image.size[0]} times {image.size[1]} pixels")
                fitted = ImageOps.fit(image.convert("RGB"), (size[1], size[0]), Image.Resampling.BILINEAR)
    except Exception as error:  # decoders raise whatever a damaged file leads them to
        found = f"is no image that can be read ({type(error).__name__}: {str(error).replace(str(path), 'it')[:120]})"
        remedy = f"Repair or remove the file; formats are {', '.join(_DECODERS)}."
        raise DataError(str(path), found, remedy) from error
    values = torch.frombuffer(bytearray(fitted.tobytes()), dtype=torch.uint8)
    return values.view(size[0], size[1], 3).permute(2, 0, 1)
