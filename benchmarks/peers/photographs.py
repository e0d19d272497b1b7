"""A real pretrained classifier, EfficientNet-Lite0, on photographs: how often the smaller model says what it said.

No labels are needed: the original's own answers are the labels, and its logits the teacher.
"""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from benchmarks.peers.gates import gates
from benchmarks.peers.hidden import hidden_of
from benchmarks.peers.measure import side_by_side
from benchmarks.peers.ours import plan
from benchmarks.peers.pruning import torch_pruning
from benchmarks.peers.subject import Method, Subject
from benchmarks.peers.training import epochs
from benchmarks.peers.widths import by_width
from benchmarks.runs import Job, Plain, named, wanted
from linearize.running.models import evaluating

__all__ = ["Size", "crops", "jobs"]

_RATE = 3e-4
_BATCH = 16
_SMALLEST = 240  # pixels of a side, for images inside of other files
_ENDINGS = {".jpg", ".jpeg", ".png", ".webp"}


@dataclass(frozen=True)
class Size:
    """Crops of so many pixels to train on, to hold back and to test on; batches of 16 to calibrate on; steps."""

    pixels: int = 160
    train: int = 2000
    held: int = 192
    test: int = 1000
    calibrate: int = 90
    tune: int = 100
    rounds: int = 9
    budgets: tuple[float, ...] = (0.75, 0.5)
    methods: tuple[str, ...] = ()


QUICK = Size(64, 48, 16, 32, 2, 2, 2, (0.75,), ("width + refit", "Torch-Pruning, magnitude"))
FULL = Size(192, 10000, 1000, 2000, 128, 1000, 15)


def images_in(folder: Path) -> dict[str, Image.Image]:
    """The images in a folder's files, by a name each; those inside of Qt's resource files (.rcc) too, if not small."""
    found: dict[str, Image.Image] = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        if path.suffix.lower() in _ENDINGS:
            found[path.name] = Image.open(path)
        if path.suffix != ".rcc":
            continue
        data = path.read_bytes()
        for start in re.finditer(rb"\xff\xd8\xff|RIFF....WEBP", data, re.DOTALL):  # a JPEG or WebP behind its length
            place = start.start()
            length = int.from_bytes(data[max(0, place - 4) : place])
            try:
                image = Image.open(io.BytesIO(data[place : place + length]))
                image.load()
            except OSError:  # what only looked like an image
                continue
            if image.mode == "RGB" and min(image.size) >= _SMALLEST:
                found[f"{path.stem}-{place}"] = image
    return found


@cache
def crops(folder: Path, pixels: int, counts: tuple[int, int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """Square crops (N, 3, pixels, pixels) in [-1, 1] to train on, hold back and test on, of different photographs.

    Where a crop lies is drawn from the name of its photograph, and so is which fifth of them are for testing and which
    tenth is held back. A crop's side is between a fifth of the photograph's shorter side and all of it.
    """
    images = images_in(folder)
    marks = {name: int(hashlib.sha256(name.encode()).hexdigest()[:8], 16) for name in images}
    names = sorted(images, key=lambda name: marks[name])
    assert len(names) >= 3, f"there are fewer than three photographs in {folder}"
    test, held = max(1, len(names) // 5), max(1, len(names) // 10)
    parts = names[test + held :], names[test : test + held], names[:test]
    train, apart, last = (_crops(images, part, marks, pixels, n) for part, n in zip(parts, counts, strict=True))
    return train, apart, last


def _crops(
    images: Mapping[str, Image.Image], names: Sequence[str], marks: Mapping[str, int], pixels: int, count: int
) -> Tensor:
    each = -(-count // len(names))
    tensors: list[Tensor] = []
    for name in names:
        generator = torch.Generator().manual_seed(marks[name])
        image = images[name].convert("RGB")
        for _ in range(each):
            share, left, top = torch.rand(3, generator=generator).tolist()
            side = int(min(image.size) * (0.2 + 0.8 * share))
            x, y = int(left * (image.width - side)), int(top * (image.height - side))
            small = image.resize((pixels, pixels), Image.Resampling.BICUBIC, (x, y, x + side, y + side))
            tensors.append(torch.frombuffer(bytearray(small.tobytes()), dtype=torch.uint8).view(pixels, pixels, 3))
    order = torch.randperm(len(tensors), generator=torch.Generator().manual_seed(0))[:count]
    stacked = torch.stack([tensors[place] for place in order.tolist()]).permute(0, 3, 1, 2)
    return stacked.contiguous().float() / 127.5 - 1


def efficientnet(weights: Path) -> nn.Module:
    """The network of timm with weights that stand in a file in the order of its own."""
    from linearize.zoo import create

    model = create("timm:tf_efficientnet_lite0")
    held = torch.load(weights, map_location="cpu", weights_only=True)
    names = list(model.state_dict())
    assert len(held) == len(names), f"{weights} holds {len(held)} tensors, the network {len(names)}"
    model.load_state_dict(dict(zip(names, held.values(), strict=True)))
    return model.eval()


def said(model: nn.Module, images: Tensor) -> Tensor:
    """Classes (N,) that a model names."""
    with evaluating(model):
        return torch.cat([model(part).argmax(1) for part in images.split(50)])


def subject_of(seed: int, size: Size, folder: Path, weights: Path) -> Subject:
    """The pretrained model."""
    images, apart, test = crops(folder, size.pixels, (size.train, size.held, size.test))
    model = efficientnet(weights)
    labels, reference = said(model, images), said(model, test)
    held = list(zip(apart.split(_BATCH), said(model, apart).split(_BATCH), strict=True))
    order = epochs(len(images), _BATCH, seed)

    def pick(step: int) -> tuple[Tensor, Tensor]:
        chosen = list(order(step))
        return images[chosen], labels[chosen]

    def score(small: nn.Module) -> dict[str, float]:
        return {"agreement": float((said(small, test) == reference).double().mean())}

    known = list(zip(images.split(_BATCH), labels.split(_BATCH), strict=True))[: size.calibrate]
    hidden, last = hidden_of(model), ("classifier",)
    found = Subject(model, images[:_BATCH], known, pick, score, size.tune, _RATE, hidden, last, distill=1.0, seed=seed)
    found.sizes, found.held, found.gentle_lr = (1, _BATCH), held, _RATE / 10
    return found


def work(seed: int, size: Size, folder: Path, weights: Path, out: Path) -> Plain:
    """One run."""
    subject = subject_of(seed, size, folder, weights)
    methods: dict[str, Method] = {
        "plan": plan("flops", cache=out / "latency.json", timed=True),
        "plan, latency": plan("latency", cache=out / "latency.json"),
        "gates": gates(both=False, cache=out / "latency.json"),
        "both": gates(both=True, cache=out / "latency.json"),
        "width + refit": by_width,
        "Torch-Pruning, magnitude": torch_pruning("all", "magnitude"),
        "Torch-Pruning, Taylor": torch_pruning("all", "taylor"),
    }
    methods = {name: method for name, method in methods.items() if wanted(name, size.methods)}
    return side_by_side(subject, methods, size.budgets, rounds=size.rounds)


def jobs(size: Size, seeds: int, folder: Path | None, weights: Path | None, out: Path) -> list[Job]:
    """A job for each seed, which decides the order of the crops."""
    if folder is None or weights is None:
        raise SystemExit("Pass --photographs FOLDER and --weights FILE.pth: see benchmarks/peers/README.md.")
    asked = {"experiment": "photographs", "network": "EfficientNet-Lite0", **asdict(size)}
    return [
        Job(
            named("photographs", seed, size.methods),
            {**asked, "seed": seed},
            partial(work, seed, size, folder, weights, out),
        )
        for seed in range(seeds)
    ]
