"""A small Llama, trained on sentences about software, whose gated FFNs shrink."""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass
from functools import cache, partial

import torch
from torch import Tensor, nn

from benchmarks.minilm import sentences
from benchmarks.peers.ffn import of_hidden, one_by_one, relabelled
from benchmarks.peers.gates import gates
from benchmarks.peers.hidden import hidden_of
from benchmarks.peers.measure import side_by_side
from benchmarks.peers.ours import plan
from benchmarks.peers.pruning import torch_pruning
from benchmarks.peers.subject import Method, Subject
from benchmarks.peers.training import epochs, train
from benchmarks.peers.widths import by_removal, by_width, no_cut
from benchmarks.runs import Job, Plain, named, wanted
from linearize.running.models import evaluating

__all__ = ["Size", "jobs"]

Batch = dict[str, Tensor]
_RATE = 3e-3
_BATCH = 16
_TOKENS = 64
_HELD = 4  # batches of the training text


@dataclass(frozen=True)
class Size:
    """How much of everything; budgets are fractions of the FFNs' FLOPs, `test` and `train` blocks of 64 tokens."""

    steps: int = 1000
    tune: int = 120
    train: int = 12000
    test: int = 500
    calibrate: int = 32
    width: int = 96
    layers: int = 4
    vocabulary: int = 1024
    rounds: int = 9
    budgets: tuple[float, ...] = (0.8, 0.5, 0.333, 0.25)
    methods: tuple[str, ...] = ()


QUICK = Size(10, 3, 200, 16, 4, 32, 2, 300, 2, (0.5,))
FULL = Size(4000, 800, 40000, 2000, 64, 192, 6, 2048, 15)


@cache
def blocks(size: Size) -> tuple[Tensor, Tensor]:
    """Token ids (N, T) to train on and to test on: sentences one after another, by byte pairs learned on the first."""
    from tokenizers import ByteLevelBPETokenizer

    needed = (size.train + size.test) * _TOKENS
    _, texts = sentences()
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(texts[: size.train], vocab_size=size.vocabulary, show_progress=False)
    ids: list[int] = []
    for text in texts:
        ids += tokenizer.encode(text + "\n").ids
        if len(ids) >= needed:
            break
    assert len(ids) >= needed, f"there are {len(ids)} tokens of text here: ask for fewer"
    found = torch.tensor(ids[:needed]).view(-1, _TOKENS)
    return found[size.test :], found[: size.test]


def llama(size: Size, seed: int) -> nn.Module:
    """Random weights, heads of 24, FFNs of 8/3 of the width."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.width,
        intermediate_size=size.width * 8 // 24 * 8,
        num_hidden_layers=size.layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=2 * _TOKENS,
        initializer_range=0.05,
        use_cache=False,
    )
    model: nn.Module = LlamaForCausalLM(config).eval()
    return model


def subject_of(seed: int, size: Size) -> Subject:
    """The trained model."""
    known, test = blocks(size)
    known, apart = known[: -_HELD * _BATCH], known[-_HELD * _BATCH :]
    order = epochs(len(known), _BATCH, seed)

    def labelled(ids: Tensor) -> Batch:
        return {"input_ids": ids, "labels": ids}

    def pick(step: int) -> Batch:
        return labelled(known[list(order(step))])

    def score(model: nn.Module) -> dict[str, float]:
        with evaluating(model):
            losses = [float(model(**labelled(part)).loss) for part in test.split(_BATCH) if len(part) == _BATCH]
        return {"perplexity": math.exp(sum(losses) / len(losses))}

    model = llama(size, seed)
    calibration = [labelled(known[i * _BATCH :][:_BATCH]) for i in range(size.calibrate)]
    example = {"input_ids": known[:_BATCH]}
    hidden = hidden_of(model)
    found = Subject(model, example, calibration, pick, score, size.tune, _RATE / 3, hidden, ("lm_head",), seed=seed)
    found.first, found.remember, found.sizes = size.steps, False, (1, _BATCH)
    found.held, found.fresh_lr = [labelled(part) for part in apart.split(_BATCH)], _RATE
    train(model, found.task_loss, size.steps, _RATE)
    return found


def work(seed: int, size: Size, *, timing_only: bool = False) -> Plain:
    """One run."""
    start = time.perf_counter()
    subject = subject_of(seed, size)
    spent = time.perf_counter() - start
    methods: dict[str, Method] = {
        "plan": plan("flops", timed=wanted("plan, latency", size.methods)),
        "plan, latency": plan("latency"),
        "gates": gates(both=False),
        "both": gates(both=True),
        "removal + refit": by_removal,
        "width + refit": by_width,
        "Torch-Pruning hidden, magnitude": torch_pruning("hidden", "magnitude"),
        "Torch-Pruning hidden, Taylor": torch_pruning("hidden", "taylor"),
        "whole FFNs, one by one": one_by_one,
        "no cut": no_cut,
    }
    methods = {name: method for name, method in methods.items() if wanted(name, size.methods)}
    names = of_hidden(subject, size.budgets)
    found = side_by_side(subject, methods, list(names), rounds=size.rounds, timing_only=timing_only)
    return {"seconds_training": round(spent, 1), **relabelled(found, names)}


def jobs(size: Size, seeds: int, *, timing_only: bool = False) -> list[Job]:
    """A job for each seed; a run for latencies alone is for a machine that does nothing else."""
    asked = {"experiment": "text", "network": "llama", **asdict(size)}
    asked |= {"timing_only": True} if timing_only else {}
    some = (*size.methods, "latencies") if timing_only else size.methods
    return [
        Job(
            named("text-llama", seed, some), {**asked, "seed": seed}, partial(work, seed, size, timing_only=timing_only)
        )
        for seed in range(seeds)
    ]
