"""A real pretrained encoder of sentences, all-MiniLM-L6-v2, whose FFNs shrink; the original alone is the teacher."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from benchmarks.minilm import batches, compare, embed, like_batch, load_original, sentences
from benchmarks.peers.ffn import of_hidden, relabelled
from benchmarks.peers.gates import gates
from benchmarks.peers.hidden import hidden_of
from benchmarks.peers.measure import side_by_side
from benchmarks.peers.ours import plan
from benchmarks.peers.pruning import torch_pruning
from benchmarks.peers.subject import Method, Subject
from benchmarks.peers.widths import by_removal, by_width
from benchmarks.runs import Job, Plain, named, wanted

__all__ = ["Size", "jobs"]

_RATE = 1e-4


@dataclass(frozen=True)
class Size:
    """Sentences to calibrate, to train and to test on, and steps of distillation with batches of 16."""

    calibrate: int = 1500
    train: int = 6000
    test: int = 1000
    tune: int = 100
    rounds: int = 9
    budgets: tuple[float, ...] = (0.75, 0.5, 0.25)
    methods: tuple[str, ...] = ()


QUICK = Size(192, 64, 64, 1, 1, (0.5,), ("plan", "width + refit"))
FULL = Size(5000, 50000, 2000, 2000, 15)
_BATCH = 16
_HELD = 192  # sentences


def subject_of(seed: int, size: Size) -> Subject:
    """The pretrained model, with batches of like length in an order that the seed decides."""
    _, texts = sentences()
    tokenizer, model = load_original()
    parts, start = [], 0
    for count, batch in ((size.calibrate, 64), (size.train, _BATCH), (_HELD, 64), (size.test, 64)):
        parts.append(batches(tokenizer, texts[start : start + count], batch))
        start += count
    known, training, held, test = parts
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(training), generator=generator).tolist()
    reference = embed(model, test)

    def pick(step: int) -> dict[str, torch.Tensor]:
        found: dict[str, torch.Tensor] = training[order[step % len(order)]]
        return found

    def score(small: nn.Module) -> dict[str, float]:
        return compare(reference, embed(small, test))

    example: Any = like_batch(test, 32, 32)
    found = Subject(model, example, known, pick, score, size.tune, _RATE, hidden_of(model), distill=1.0, seed=seed)
    found.sizes, found.held = (1, 32), held
    return found


def work(seed: int, size: Size, *, timing_only: bool = False) -> Plain:
    """One run."""
    subject = subject_of(seed, size)
    methods: dict[str, Method] = {
        "plan": plan("flops", exclude="pooler.*", timed=wanted("plan, latency", size.methods)),
        "plan, latency": plan("latency", exclude="pooler.*"),
        "gates": gates(both=False, exclude="pooler.*"),
        "both": gates(both=True, exclude="pooler.*"),
        "removal + refit": by_removal,
        "width + refit": by_width,
        "Torch-Pruning hidden, Taylor": torch_pruning("hidden", "taylor"),
    }
    methods = {name: method for name, method in methods.items() if wanted(name, size.methods)}
    names = of_hidden(subject, size.budgets)
    found = side_by_side(subject, methods, list(names), rounds=size.rounds, timing_only=timing_only)
    return relabelled(found, names)


def jobs(size: Size, seeds: int, *, timing_only: bool = False) -> list[Job]:
    """A job for each seed, which decides the order of the sentences."""
    asked = {"experiment": "sentences", "network": "MiniLM-L6", **asdict(size)}
    asked |= {"timing_only": True} if timing_only else {}
    some = (*size.methods, "latencies") if timing_only else size.methods
    one = partial(work, size=size, timing_only=timing_only)
    return [Job(named("sentences", s, some), {**asked, "seed": s}, partial(one, s)) for s in range(seeds)]
