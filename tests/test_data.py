"""Data sources: what they give, in which order, and what they say of bad files."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from linearize.data import load_data
from linearize.errors import DataError, UsageError


def write_idx(path: Path, values: Tensor, magic: int | None = None, claim: int | None = None) -> None:
    sizes = [claim if claim is not None else len(values), *values.shape[1:]]
    header = struct.pack(f">{1 + values.ndim}I", magic if magic is not None else 0x800 + values.ndim, *sizes)
    path.write_bytes(gzip.compress(header + bytes(values.flatten().int().tolist())))


@pytest.fixture
def mnist(tmp_path: Path) -> Path:
    for prefix, count in (("train", 10), ("t10k", 4)):
        images = torch.randint(0, 256, (count, 6, 5), dtype=torch.uint8)
        write_idx(tmp_path / f"{prefix}-images-idx3-ubyte.gz", images)
        write_idx(tmp_path / f"{prefix}-labels-idx1-ubyte.gz", torch.arange(count, dtype=torch.uint8) % 3)
    return tmp_path


def write_images(folder: Path, count: int, colour: tuple[int, int, int], size: tuple[int, int] = (9, 7)) -> None:
    image = pytest.importorskip("PIL.Image")
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        image.new("RGB", size, colour).save(folder / f"{index}.png")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_images(tmp_path / "cat", 6, (255, 0, 0))
    write_images(tmp_path / "dog", 5, (0, 255, 0))
    return tmp_path


def test_digits() -> None:
    data = load_data("digits", batch_size=128)
    assert (data.num_classes, data.in_chans, data.size) == (10, 1, (8, 8))
    images, labels = next(iter(data.train))
    assert images.shape == (128, 1, 8, 8)
    assert images.dtype == torch.float32
    assert images.min() >= -1
    assert images.max() <= 1
    assert labels.shape == (128,)
    assert len(data.train.images) + len(data.test.images) == 1797
    assert not set(data.train.images.chosen.tolist()) & set(data.test.images.chosen.tolist())


def test_size_channels_and_normalisation() -> None:
    plain = load_data("digits", mean=[0.0], std=[1.0])
    scaled = load_data("digits", size=(16, 12), in_chans=3, mean=[0.1, 0.2, 0.3], std=[1.0, 2.0, 4.0])
    a, b = next(iter(plain.test))[0], next(iter(scaled.test))[0]
    assert b.shape[1:] == (3, 16, 12)
    restored = b * torch.tensor([1.0, 2.0, 4.0]).view(1, 3, 1, 1) + torch.tensor([0.1, 0.2, 0.3]).view(1, 3, 1, 1)
    assert torch.allclose(restored[:, 0], restored[:, 2], atol=1e-6)
    assert torch.allclose(restored.mean(), a.mean(), atol=2e-2)


def test_order_follows_seed_and_epoch() -> None:
    def labels(data: Any) -> list[int]:
        return [int(y) for _, batch in data.train for y in batch]

    first, second = load_data("digits", limit=64, seed=1), load_data("digits", limit=64, seed=1)
    epochs = [labels(first) for _ in range(3)]
    assert epochs[0] != epochs[1]
    assert epochs == [labels(second) for _ in range(3)]
    second.train.set_epoch(1)
    assert labels(second) == epochs[1]
    assert labels(load_data("digits", limit=64, seed=2)) != epochs[0]


def test_the_test_set_is_whole_and_in_order() -> None:
    data = load_data("digits", batch_size=100)
    sizes = [len(labels) for _, labels in data.test]
    assert sum(sizes) == len(data.test.images) == 359
    assert sizes[-1] == 59
    assert len(data.test) == len(sizes)
    assert all(torch.equal(a[1], b[1]) for a, b in zip(data.test, data.test, strict=True))


def test_training_batches_are_whole_unless_there_is_only_one() -> None:
    assert {len(labels) for _, labels in load_data("digits", batch_size=100).train} == {100}
    assert [len(labels) for _, labels in load_data("digits", batch_size=100, limit=30).train] == [30]


def test_keyword_batches() -> None:
    batch = next(iter(load_data("digits", keywords=("pixel_values", "labels")).train))
    assert list(batch) == ["pixel_values", "labels"]


def test_idx_files(mnist: Path) -> None:
    data = load_data(mnist, batch_size=4)
    assert (data.num_classes, data.in_chans, data.size) == (3, 1, (6, 5))
    assert next(iter(data.test))[1].tolist() == [0, 1, 2, 0]


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-12])


@pytest.mark.parametrize(
    ("name", "damage", "found"),
    [
        ("train-images-idx3-ubyte.gz", truncate, "truncated or damaged"),
        ("train-images-idx3-ubyte.gz", lambda p: p.write_bytes(b"not a gzip file"), "is no gzip file"),
        (
            "train-images-idx3-ubyte.gz",
            lambda p: p.write_bytes(gzip.compress(b"123")),
            "too few for a header",
        ),
        ("train-images-idx3-ubyte.gz", lambda p: p.unlink(), "does not exist"),
        (
            "train-images-idx3-ubyte.gz",
            lambda p: write_idx(p, torch.zeros(10, 6, 5), magic=7),
            "starts with 7 ",
        ),
        (
            "train-images-idx3-ubyte.gz",
            lambda p: write_idx(p, torch.zeros(10, 6, 5), claim=11),
            "promises 330",
        ),
        ("train-images-idx3-ubyte.gz", lambda p: write_idx(p, torch.zeros(0, 6, 5)), "promises 0"),
        ("train-images-idx3-ubyte.gz", lambda p: write_idx(p, torch.zeros(10, 5, 5)), "images of"),
        ("train-labels-idx1-ubyte.gz", lambda p: write_idx(p, torch.zeros(9)), "10 images but 9 labels"),
        ("train-labels-idx1-ubyte.gz", lambda p: write_idx(p, torch.ones(10)), "one class only"),
        ("t10k-labels-idx1-ubyte.gz", lambda p: write_idx(p, torch.full((4,), 9)), "class 9 in the test"),
    ],
)
def test_bad_idx_files(mnist: Path, name: str, damage: Any, found: str) -> None:
    damage(mnist / name)
    with pytest.raises(DataError, match=found):
        load_data(mnist)


def test_image_folder(folder: Path) -> None:
    data = load_data(folder, size=8, mean=[0.0], std=[1.0], batch_size=2)
    assert data.classes == ("cat", "dog")
    assert (data.in_chans, data.size) == (3, (8, 8))
    assert (len(data.train.images), len(data.test.images)) == (9, 2)
    for images, labels in data.test:
        for image, label in zip(images, labels, strict=True):
            assert image[label].min() == 1
            assert image.sum() == 64


def test_image_folder_with_its_own_test_set(tmp_path: Path) -> None:
    for part, count in (("train", 3), ("val", 1)):
        write_images(tmp_path / part / "cat", count, (255, 0, 0))
        write_images(tmp_path / part / "dog", count, (0, 255, 0))
    data = load_data(tmp_path, size=4)
    assert (len(data.train.images), len(data.test.images)) == (6, 2)


def test_what_is_no_image_is_left_out_and_what_is_broken_is_named(folder: Path) -> None:
    (folder / "cat" / "notes.txt").write_text("hello")
    assert len(load_data(folder, size=4).train.images) == 9
    (folder / "dog" / "0.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"0\.png: is no image"):
        list(load_data(folder, size=4).train)


@pytest.mark.parametrize(
    ("classes", "found"),
    [
        ({}, "neither idx .gz files nor folders"),
        ({"cat": 0}, "found no image"),
        ({"cat": 6}, "one class only"),
        ({"cat": 6, "dog": 0}, "dog: found no image"),
        ({"cat": 2, "dog": 2}, "no image for testing"),
        ({"train/cat": 1, "train/dog": 1, "test/cow": 1}, "'cow' for testing"),
    ],
)
def test_bad_image_folders(tmp_path: Path, classes: dict[str, int], found: str) -> None:
    for name, count in classes.items():
        write_images(tmp_path / name, count, (1, 2, 3))
    with pytest.raises(DataError, match=found):
        load_data(tmp_path)


def test_missing_folder_and_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        load_data(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="is a file"):
        load_data(tmp_path / "file")


@pytest.mark.parametrize(
    ("options", "where"),
    [
        ({"batch_size": 0}, "batch_size"),
        ({"limit": 0}, "limit"),
        ({"size": 0}, "size"),
        ({"mean": [0.1, 0.2]}, "mean"),
        ({"std": [0.0]}, "std"),
    ],
)
def test_bad_options(options: dict[str, Any], where: str) -> None:
    with pytest.raises(UsageError, match=where):
        load_data("digits", **options)
