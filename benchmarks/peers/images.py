"""Small classifiers of Fashion-MNIST, compressed by every method to the same FLOPs."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from benchmarks.peers.folding import layer_folding
from benchmarks.peers.gates import gates
from benchmarks.peers.hidden import hidden_of
from benchmarks.peers.measure import side_by_side
from benchmarks.peers.nas import modelopt
from benchmarks.peers.networks import draw, make
from benchmarks.peers.ours import plan
from benchmarks.peers.pruning import torch_pruning
from benchmarks.peers.subject import Method, Subject
from benchmarks.peers.training import epochs, train
from benchmarks.peers.widths import by_width, from_scratch, no_cut
from benchmarks.runs import Job, Plain, named, wanted
from linearize.data import load_data
from linearize.running.models import evaluating

__all__ = ["FOLDER", "Size", "jobs", "subject_of"]

FOLDER = Path("/usr/share/datasets/fashion-mnist")  # Debian package dataset-fashion-mnist
_MEAN, _STD = 0.286, 0.353
_BATCH = 64
_RATE = 3e-3  # of training from random weights
_TUNE = {"vit": 3e-4}  # of fine-tuning, else a third of that: docs/peers.md tells how that came


# FFNs are 6 tenths of the ViT's FLOPs, and most of the others'.
_BUDGETS = {
    "vit": (0.85, 0.75, 0.65, 0.55, 0.47),
    "convnext": (0.6, 0.5, 0.4, 0.33, 0.28),
    "mobilenet": (0.8, 0.65, 0.5, 0.4, 0.3),
}


@dataclass(frozen=True)
class Size:
    """How much of everything.

    Attributes:
        steps, tune: of training from random weights, and of fine-tuning, with batches of 64.
        train, held, test: images.
        calibrate: batches of 64 on which methods look at the model.
        budgets: of FLOPs, or of latency for the plan by latency, by network.
        rounds: of latencies.
        networks, methods: names.
    """

    steps: int = 1600
    tune: int = 120
    train: int = 12800
    held: int = 1000
    test: int = 5000
    calibrate: int = 16
    rounds: int = 9
    networks: tuple[str, ...] = ("vit", "convnext", "mobilenet")
    methods: tuple[str, ...] = ()
    budgets: int = 5

    def of(self, network: str) -> tuple[float, ...]:
        """The budgets of a network."""
        every = _BUDGETS[network]
        return every if self.budgets >= len(every) else every[2 : 2 + self.budgets]


QUICK = Size(
    12, 4, 640, 100, 200, 2, 2, ("vit",), ("plan", "width + refit", "Torch-Pruning hidden, Taylor", "layer folding"), 1
)
FULL = Size(3000, 600, 51200, 5000, 10000, 32, 15)


@cache
def fashion(folder: Path, count: int, test: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images (N, 1, 28, 28) and classes (N,) to train on and to test on."""
    found: list[Tensor] = []
    for part, limit in (("train", count), ("test", test)):
        source = load_data(folder, batch_size=20, limit=limit, mean=(_MEAN,), std=(_STD,))
        pairs = list(source.train if part == "train" else source.test)
        found += [torch.cat([images for images, _ in pairs]), torch.cat([labels for _, labels in pairs])]
    return found[0], found[1], found[2], found[3]


def subject_of(network: str, seed: int, size: Size, folder: Path) -> Subject:
    """A network trained from random weights; the seed decides these and the order of the images."""
    every, classes, test, test_labels = fashion(folder, size.train + size.held, size.test)
    images, labels = every[: size.train], classes[: size.train]
    held = list(zip(every[size.train :].split(250), classes[size.train :].split(250), strict=True))
    order = epochs(len(images), _BATCH, seed)

    def pick(step: int) -> tuple[Tensor, Tensor]:
        chosen = list(order(step))
        return images[chosen], labels[chosen]

    def score(model: nn.Module) -> dict[str, float]:
        with evaluating(model):
            outputs = torch.cat([model(part) for part in test.split(250)])
        right = outputs.argmax(1) == test_labels
        return {"accuracy": float(right.double().mean()), "loss": float(cross_entropy(outputs, test_labels))}

    model = make(network, seed)
    known = [(images[i * _BATCH :][:_BATCH], labels[i * _BATCH :][:_BATCH]) for i in range(size.calibrate)]
    last = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)][-1]
    heads = {name: 4 for name, module in model.named_modules() if name.endswith("attn.qkv")}
    rate = _TUNE.get(network, _RATE / 3)
    found = Subject(
        model, images[:_BATCH], known, pick, score, size.tune, rate, hidden_of(model), (last,), heads, held, seed=seed
    )
    found.first, found.fresh_lr = size.steps, _RATE
    train(model, found.task_loss, size.steps, _RATE)
    return found


def methods_of(network: str, seed: int, size: Size, out: Path) -> dict[str, Method]:
    """Every method by name, or those that the size names."""
    fresh = partial(make, network, 1000 + seed)
    redraw: Callable[[nn.Module], object] = partial(draw, network)
    every: dict[str, Method] = {
        "plan": plan("flops", cache=out / "latency.json", timed=True),
        "plan, latency": _some(plan("latency", cache=out / "latency.json"), 0, 2, 4),
        "gates": gates(both=False, cache=out / "latency.json"),
        "both": gates(both=True, cache=out / "latency.json"),
        "width + refit": by_width,
        "Torch-Pruning, magnitude": torch_pruning("all", "magnitude"),
        "Torch-Pruning, Taylor": torch_pruning("all", "taylor"),
        "Torch-Pruning hidden, magnitude": torch_pruning("hidden", "magnitude"),
        "Torch-Pruning hidden, Taylor": torch_pruning("hidden", "taylor"),
        "ModelOpt FastNAS": modelopt,
        "layer folding": layer_folding(),
        "no cut": no_cut,
        "scratch": _some(from_scratch(fresh, redraw, size.steps + size.tune), 2),
    }
    return {name: method for name, method in every.items() if wanted(name, size.methods)}


def _some(method: Method, *places: int) -> Method:
    """A method that takes long, at some of the budgets only."""
    return lambda subject, budgets: method(subject, [budgets[i] for i in places if i < len(budgets)] or budgets)


def work(network: str, seed: int, size: Size, folder: Path, out: Path, *, timing_only: bool = False) -> Plain:
    """One run."""
    start = time.perf_counter()
    subject = subject_of(network, seed, size, folder)
    spent = time.perf_counter() - start
    methods = methods_of(network, seed, size, out)
    found = side_by_side(subject, methods, size.of(network), rounds=size.rounds, timing_only=timing_only)
    return {"seconds_training": round(spent, 1), **found}


def jobs(size: Size, seeds: int, folder: Path, out: Path, *, timing_only: bool = False) -> list[Job]:
    """A job for each network and seed; a run for latencies alone is for a machine that does nothing else."""
    made = []
    for seed in range(seeds):
        for network in size.networks:
            asked = {"experiment": "images", "network": network, "seed": seed, **asdict(size), "networks": None}
            asked |= {"asked_budgets": size.of(network)}
            some = size.methods
            if timing_only:
                asked, some = {**asked, "timing_only": True}, (*some, "latencies")
            name = named(f"images-{network}", seed, some)
            one = partial(work, network, seed, size, folder, out, timing_only=timing_only)
            made.append(Job(name, asked, one))
    return made
