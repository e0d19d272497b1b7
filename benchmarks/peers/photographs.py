"""A real pretrained classifier, EfficientNet-Lite0, on photographs: how often the smaller model says what it said.

No labels are needed: the original's own answers are the labels, and its logits the teacher.
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.peers.hidden import hidden_of
from benchmarks.peers.measure import side_by_side
from benchmarks.peers.ours import plan
from benchmarks.peers.pruning import torch_pruning
from benchmarks.peers.subject import Method, Subject
from benchmarks.peers.training import epochs
from benchmarks.peers.widths import by_width
from benchmarks.runs import Job, Plain
from linearize.running.models import evaluating

__all__ = ["Size", "crops", "jobs"]

_RATE = 3e-4
_BATCH = 16
_ENDINGS = {".jpg", ".jpeg", ".png", ".webp"}


@dataclass(frozen=True)
class Size:
    """Crops of so many pixels to train on, to hold back and to test on; batches of 16 to calibrate on; steps."""

    pixels: int = 160
    train: int = 2000
    held: int = 192
    test: int = 500
    calibrate: int = 24
    tune: int = 100
    rounds: int = 9
    budgets: tuple[float, ...] = (0.75, 0.5)
    methods: tuple[str, ...] = ()


QUICK = Size(64, 48, 16, 32, 2, 2, 2, (0.75,), ("width + refit", "Torch-Pruning, magnitude"))
FULL = Size(192, 10000, 1000, 2000, 64, 1000, 15)


@cache
def crops(folder: Path, pixels: int, train: int, test: int) -> tuple[Tensor, Tensor]:
    """Square crops (N, 3, pixels, pixels) in [-1, 1] to train and to test on, of different photographs.

    Where a crop lies is drawn from the name of its photograph, and so is which fifth of them are for testing. A crop's
    side is between a fifth of the photograph's shorter side and all of it.
    """
    from PIL import Image

    paths = [path for path in sorted(folder.rglob("*")) if path.suffix.lower() in _ENDINGS and path.is_file()]
    marks = {path: int(hashlib.sha256(path.name.encode()).hexdigest()[:8], 16) for path in paths}
    paths.sort(key=lambda path: marks[path])
    apart = max(1, len(paths) // 5)
    found = []
    for some, count in ((paths[apart:], train), (paths[:apart], test)):
        assert some, f"there are fewer than two photographs in {folder}"
        each = -(-count // len(some))
        tensors: list[Tensor] = []
        for path in some:
            generator = torch.Generator().manual_seed(marks[path])
            with Image.open(path) as opened:
                image = opened.convert("RGB")
            for _ in range(each):
                share, left, top = torch.rand(3, generator=generator).tolist()
                side = int(min(image.size) * (0.2 + 0.8 * share))
                x, y = int(left * (image.width - side)), int(top * (image.height - side))
                small = image.resize((pixels, pixels), Image.Resampling.BICUBIC, (x, y, x + side, y + side))
                tensors.append(torch.frombuffer(bytearray(small.tobytes()), dtype=torch.uint8).view(pixels, pixels, 3))
        order = torch.randperm(len(tensors), generator=torch.Generator().manual_seed(0))[:count]
        stacked = torch.stack([tensors[place] for place in order.tolist()]).permute(0, 3, 1, 2)
        found.append(stacked.contiguous().float() / 127.5 - 1)
    return found[0], found[1]


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
    every, test = crops(folder, size.pixels, size.train + size.held, size.test)
    model = efficientnet(weights)
    classes, reference = said(model, every), said(model, test)
    images, labels = every[: size.train], classes[: size.train]
    held = list(zip(every[size.train :].split(_BATCH), classes[size.train :].split(_BATCH), strict=True))
    order = epochs(len(images), _BATCH, seed)

    def pick(step: int) -> tuple[Tensor, Tensor]:
        chosen = list(order(step))
        return images[chosen], labels[chosen]

    def score(small: nn.Module) -> dict[str, float]:
        return {"agreement": float((said(small, test) == reference).double().mean())}

    known = list(zip(images.split(_BATCH), labels.split(_BATCH), strict=True))[: size.calibrate]
    hidden, last = hidden_of(model), ("classifier",)
    found = Subject(model, images[:_BATCH], known, pick, score, size.tune, _RATE, hidden, last, distill=1.0, seed=seed)
    found.sizes, found.held = (1, _BATCH), held
    return found


def work(seed: int, size: Size, folder: Path, weights: Path, out: Path) -> Plain:
    """One run."""
    subject = subject_of(seed, size, folder, weights)
    methods: dict[str, Method] = {
        "plan": plan("flops"),
        "plan, latency": plan("latency", cache=out / "latency.json"),
        "width + refit": by_width,
        "Torch-Pruning, magnitude": torch_pruning("all", "magnitude"),
        "Torch-Pruning, Taylor": torch_pruning("all", "taylor"),
    }
    methods = {name: method for name, method in methods.items() if not size.methods or name in size.methods}
    return side_by_side(subject, methods, size.budgets, rounds=size.rounds)


def jobs(size: Size, seeds: int, folder: Path | None, weights: Path | None, out: Path) -> list[Job]:
    """A job for each seed, which decides the order of the crops."""
    if folder is None or weights is None:
        raise SystemExit("Pass --photographs FOLDER and --weights FILE.pth: see benchmarks/peers/README.md.")
    asked = {"experiment": "photographs", "network": "EfficientNet-Lite0", **asdict(size)}
    return [
        Job(f"photographs-{seed}", {**asked, "seed": seed}, partial(work, seed, size, folder, weights, out))
        for seed in range(seeds)
    ]
