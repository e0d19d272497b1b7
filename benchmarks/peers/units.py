"""Budgets in nonlinear units, as private inference asks for: which channels may lose their activation.

Every model gets the same number of training steps after the original's: SNL spends some of them on its search.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.papers.images import SIZE, image_set
from benchmarks.papers.networks import ResNet, vision_transformer
from benchmarks.peers.channels import planned, selective, spread
from benchmarks.peers.measure import side_by_side
from benchmarks.peers.subject import Method, Subject
from benchmarks.peers.training import epochs, train
from benchmarks.runs import Job, Plain, named, wanted
from linearize.running.models import evaluating

__all__ = ["Size", "jobs"]

_BATCH = 64
_RATES = {"resnet": 1e-2, "vit": 3e-3}


@dataclass(frozen=True)
class Size:
    """How much of everything, as in `images.Size`; `search` is the most steps that SNL may search."""

    steps: int = 600
    tune: int = 300
    search: int = 200
    train: int = 12800
    test: int = 5000
    width: int = 8
    depth: int = 20
    calibrate: int = 16
    budgets: tuple[float, ...] = (0.5, 0.2, 0.1, 0.05)
    networks: tuple[str, ...] = ("resnet", "vit")
    methods: tuple[str, ...] = ()


QUICK = Size(10, 6, 4, 640, 200, 4, 8, 2, (0.5, 0.2))
FULL = Size(3000, 1500, 1000, 51200, 10000, 16, 20, 32)


def subject_of(network: str, seed: int, size: Size, folder: Path) -> Subject:
    """A trained network on images of 14 x 14 pixels."""
    data = image_set(folder, 10, size.train, size.test)
    order = epochs(len(data.train), _BATCH, seed)

    def pick(step: int) -> tuple[Tensor, Tensor]:
        chosen = list(order(step))
        return data.train[chosen], data.train_labels[chosen]

    def score(model: nn.Module) -> dict[str, float]:
        with evaluating(model):
            outputs = torch.cat([model(part) for part in data.test.split(250)])
        return {"accuracy": float((outputs.argmax(1) == data.test_labels).double().mean())}

    torch.manual_seed(seed)
    make: dict[str, Callable[[], nn.Module]] = {
        "resnet": lambda: ResNet(size.depth, size.width, 10),
        "vit": lambda: vision_transformer(SIZE, 10),
    }
    model = make[network]()
    known = list(zip(data.train.split(_BATCH), data.train_labels.split(_BATCH), strict=True))[: size.calibrate]
    rate = _RATES[network]
    found = Subject(
        model, data.train[:_BATCH], known, pick, score, size.tune, rate / 3, (), first=size.steps, seed=seed
    )
    train(model, found.task_loss, size.steps, rate)
    return found


def work(network: str, seed: int, size: Size, folder: Path) -> Plain:
    """One run."""
    start = time.perf_counter()
    subject = subject_of(network, seed, size, folder)
    spent = time.perf_counter() - start
    methods: dict[str, Method] = {
        "plan": planned,
        "SNL": selective(size.search),
        "uniform": partial(spread, equal=True),
        "random": partial(spread, equal=False),
    }
    methods = {name: method for name, method in methods.items() if wanted(name, size.methods)}
    return {"seconds_training": round(spent, 1), **side_by_side(subject, methods, size.budgets, rounds=0)}


def jobs(size: Size, seeds: int, folder: Path) -> list[Job]:
    """A job for each network and seed."""
    made = []
    for seed in range(seeds):
        for network in size.networks:
            asked = {"experiment": "units", "network": network, "seed": seed, **asdict(size), "networks": None}
            name = named(f"units-{network}", seed, size.methods)
            made.append(Job(name, asked, partial(work, network, seed, size, folder)))
    return made
