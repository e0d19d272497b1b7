"""One run: every method's models, fine-tuned alike, tested alike, and timed in turns in one process."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

import linearize
from benchmarks.peers.subject import Candidate, Method, Subject
from benchmarks.peers.training import train
from benchmarks.runs import Plain
from linearize.cost import cost

__all__ = ["side_by_side"]

Models = dict[str, nn.Module]


def side_by_side(
    subject: Subject,
    methods: Mapping[str, Method],
    budgets: Sequence[float],
    *,
    rounds: int,
    timing_only: bool = False,
    say: bool = True,
) -> Plain:
    """All methods at all budgets.

    Args:
        subject: the trained model with its data.
        methods: by name.
        budgets: fractions of the original's cost, falling; in the measure that the method limits.
        rounds: of latencies.
        timing_only: neither train nor test the models: only their latencies are wanted.
        say: print a line for each method.

    Returns:
        "original" with its scores, FLOPs and parameters, "rows", one for each method and budget, and "seconds_of" with
        the seconds that each method took to make its models, and to fine-tune them.
    """
    before = cost(subject.model, subject.example)
    original = {"scores": subject.score(subject.model), "flops": before.flops, "parameters": before.parameters}
    models: Models = {"original": subject.model}
    rows: list[Plain] = []
    seconds: dict[str, list[float]] = {}
    for name, method in methods.items():
        torch.manual_seed(subject.seed)
        start = time.perf_counter()
        try:
            made = method(subject, budgets)
        except linearize.LinearizeError as error:
            made = [Candidate(budget, None, failed=f"{type(error).__name__}: {error}"[:200]) for budget in budgets]
        middle = time.perf_counter()
        rows += _untouched(subject, name, made, models) if timing_only else _tuned(subject, name, made, models)
        seconds[name] = [round(middle - start, 1), round(time.perf_counter() - middle, 1)]
        if say:
            print(f"  {name}: {seconds[name][0]:.0f} s to make, {seconds[name][1]:.0f} s to fine-tune", flush=True)
    _time(subject, models, rows, rounds)
    return {"original": original, "rows": rows, "seconds_of": seconds}


def _tuned(subject: Subject, name: str, made: Sequence[Candidate], models: Models) -> list[Plain]:
    """Fine-tune and test; a model that stands for several budgets is trained once."""
    done: dict[int, tuple[str, Plain]] = {}
    rows = []
    whole = cost(subject.model, subject.example)
    for candidate in made:
        reached = candidate.reached if math.isfinite(candidate.reached) else None  # JSON knows no NaN
        row = {"method": name, "budget": candidate.budget, "reached": reached, "met": candidate.met}
        row |= {"told": candidate.told}
        if candidate.model is None:
            rows.append({**row, "failed": candidate.failed})
            continue
        if id(candidate.model) not in done:
            key = f"{name} {candidate.budget}"
            try:
                model, facts = _train_one(subject, candidate)
                after = cost(model, subject.example)
            except RuntimeError as error:  # a pruned model may fail in training only
                rows.append({**row, "failed": f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"})
                continue
            models[key] = model
            facts |= {"flops": after.flops / whole.flops, "parameters": after.parameters / whole.parameters}
            done[id(candidate.model)] = key, facts
        key, facts = done[id(candidate.model)]
        rows.append({**row, "model": key, **facts})
    return rows


def _untouched(subject: Subject, name: str, made: Sequence[Candidate], models: Models) -> list[Plain]:
    """The models as they are."""
    rows = []
    for candidate in made:
        if candidate.model is not None:
            key = f"{name} {candidate.budget}"
            models[key] = candidate.model.eval()
            row: Plain = {"method": name, "budget": candidate.budget, "told": candidate.told, "model": key}
            rows.append({**row, "flops": subject.share(candidate.model)})
    return rows


def _train_one(subject: Subject, candidate: Candidate) -> tuple[nn.Module, Plain]:
    """The model after fine-tuning, or as it was if the held-back data say that this was better, and what to note."""
    untouched: Any = candidate.model
    before = None if candidate.scratch else subject.score(untouched)
    steps = subject.steps if candidate.steps is None else candidate.steps
    start = time.perf_counter()
    if candidate.scratch:
        model, rate = copy.deepcopy(untouched), subject.fresh_lr
        steps = train(model, subject.task_loss, candidate.scratch, rate)
    else:
        model, rate = _tuned_at(subject, untouched, steps)
    spent, tuned = round(time.perf_counter() - start, 1), subject.score(model)
    facts = {"before": before, "steps": steps, "seconds": spent, "tuned": tuned, "lr": rate}
    control = untouched is subject.model  # its distillation loss is 0 before training: that tells nothing
    if before is not None and not control and subject.judge(untouched) <= subject.judge(model):
        return copy.deepcopy(untouched), {**facts, "after": before, "kept": "before"}
    return model, {**facts, "after": tuned, "kept": "after"}


def _tuned_at(subject: Subject, untouched: nn.Module, steps: int) -> tuple[nn.Module, float]:
    """A copy of a model after fine-tuning, and the rate: of two ways the better one by the held-back data."""
    made = []
    for rate in (subject.lr, subject.gentle_lr):
        if rate:
            model = copy.deepcopy(untouched)
            train(model, subject.loss, steps, rate, keep_norms=rate == subject.gentle_lr)
            made.append((subject.judge(model) if subject.gentle_lr else 0.0, rate, model))
    _, rate, model = min(made, key=lambda one: one[0])
    return model, rate


def _time(subject: Subject, models: Models, rows: list[Plain], rounds: int) -> None:
    """Latencies of all models in turns; each row gets its ratio to the original's, by batch size."""
    if not rounds:
        return
    timed: Any = linearize.benchmark(models, subject.example, rounds=rounds, batch_sizes=list(subject.sizes)).to_dict()
    found: dict[str, Plain] = {name: {} for name in models}
    for ratio in timed["ratios"]:
        numbers = [round(ratio[part], 4) for part in ("median", "q1", "q3")]
        found[ratio["model"]][str(ratio["batch_size"])] = numbers
    for row in rows:
        if "model" in row:
            row["latency"] = found[row["model"]]
