"""Models that generate, side by side: time to the first token, tokens per second, time between tokens, and memory."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from linearize import checks
from linearize.errors import UsageError
from linearize.report.timing import environment, quartiles, write_json
from linearize.running.devices import check_whole
from linearize.running.models import device_of
from linearize.serving.memory import memory
from linearize.serving.point import Point, check_serving
from linearize.serving.turns import Samples, decode_in_turns
from linearize.text_table import render

__all__ = ["GenerationResult", "Served", "benchmark_generation"]


@dataclass(frozen=True)
class Served:
    """How one model generates, at one batch size and length of the prompt. Times are in seconds.

    Attributes:
        model: its name.
        batch_size, prompt, new_tokens: texts at a time, tokens that each begins with, and tokens that are written.
        first: time to the first token: the median.
        first_quartiles: its quartiles.
        tokens_per_second: of all texts together, behind the first token: the median over rounds.
        between_p50, between_p95: time from a token to the next; 50% and 95% of them take no longer.
        first_ratio, between_ratio: relative to the first model, taken round by round; None for itself.
        weights, cache: bytes that the model takes when all is written, counted.
        peak: bytes at the worst moment, as the device tells; None where it does not, as on CPUs.
    """

    model: str
    batch_size: int
    prompt: int
    new_tokens: int
    first: float
    first_quartiles: tuple[float, float]
    tokens_per_second: float
    between_p50: float
    between_p95: float
    first_ratio: float | None
    between_ratio: float | None
    weights: int
    cache: int
    peak: int | None


@dataclass(frozen=True)
class GenerationResult:
    """The result of `benchmark_generation`. It prints as a table.

    Attributes:
        rows: one for each model, batch size and length of the prompt.
        environment: device, threads, dtype, versions, rounds.
    """

    rows: tuple[Served, ...]
    environment: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Plain data; times in seconds."""
        return {"unit": "seconds", "environment": dict(self.environment), "rows": [asdict(row) for row in self.rows]}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write `to_dict` as JSON.

        Raises:
            UsageError: the file cannot be written.
        """
        write_json(path, self.to_dict())

    def __str__(self) -> str:
        head = ["model", "batch", "prompt", "new", "first token s [quartiles]", "ratio", "tokens/s"]
        head += ["between p50 s", "p95 s", "ratio", "weights + cache MB", "peak MB"]
        rows = []
        for r in self.rows:
            low, high = r.first_quartiles
            first = f"{r.first:.3g} [{low:.3g}, {high:.3g}]"
            rows.append(
                [r.model, r.batch_size, r.prompt, r.new_tokens, first, _ratio(r.first_ratio),
                 f"{r.tokens_per_second:.3g}",
                 f"{r.between_p50:.3g}", f"{r.between_p95:.3g}", _ratio(r.between_ratio),
                 f"{r.weights / 1e6:.3g} + {r.cache / 1e6:.3g}", None if r.peak is None else f"{r.peak / 1e6:.3g}"]
            )  # fmt: skip
        facts = self.environment
        title = f"{facts['device']}, {facts['threads']} threads, {facts['dtype']}, torch {facts['torch']}"
        return f"{title}\n{render(head, rows)}"


def benchmark_generation(
    models: Mapping[str, nn.Module],
    *,
    prompts: Sequence[int] = (128,),
    new_tokens: int = 32,
    batch_sizes: Sequence[int] = (1,),
    rounds: int = 5,
    progress: Callable[[str], None] | None = None,
) -> GenerationResult:
    """Measure how models generate, in turns, each with its own cache, where they are.

    All models read the same tokens, whatever they would write themselves, so that they do the same work.

    Args:
        models: by name; ratios are relative to the first.
        prompts: tokens that a text begins with; each number is measured.
        new_tokens: tokens that are written.
        batch_sizes: texts at a time; each number is measured.
        rounds: number of measurements of each model.
        progress: a function that is called with a line of text before each series of measurements.

    Raises:
        UsageError: a number is out of range, or a model does not generate text of this length.
    """
    named = _checked(models)
    lengths = checks.wholes("prompts", prompts)
    sizes = checks.wholes("batch_sizes", batch_sizes)
    checks.whole("new_tokens", new_tokens, 1)
    checks.whole("rounds", rounds, 1)
    points = [(length, Point(size, length + new_tokens)) for size in sizes for length in lengths]
    for model in named.values():
        for _, point in points:
            check_serving(model, point, "generate")
    rows: list[Served] = []
    for length, point in points:
        if progress is not None:
            progress(
                f"generating with {', '.join(named)}: batch {point.batch}, prompt {length}, {new_tokens} new tokens"
            )
        samples = decode_in_turns(named, point, rounds=rounds, steps=new_tokens)
        rows += _rows(named, samples, point, length)
    first = next(iter(named.values()))
    facts = environment(device_of(first), next(p.dtype for p in first.parameters() if p.is_floating_point()))
    return GenerationResult(tuple(rows), {**facts, "rounds": rounds})


def _checked(models: Any) -> dict[str, nn.Module]:
    if not isinstance(models, Mapping) or not models or not all(isinstance(m, nn.Module) for m in models.values()):
        raise UsageError("models", f"found a {type(models).__name__}", "Pass a dict of names and modules.")
    named = {str(name): model for name, model in models.items()}
    for model in named.values():
        check_whole(model, values=True)
    return named


def _rows(named: Mapping[str, nn.Module], samples: Mapping[str, Samples], point: Point, length: int) -> list[Served]:
    """What was measured at one point."""
    reference, rows = next(iter(named)), []
    for name, model in named.items():
        found, steps = samples[name], point.context - length
        low, first, high = quartiles([value for values in found.prefill for value in values])
        between = torch.tensor([value for values in found.steps for value in values], dtype=torch.float64)
        p50, p95 = (float(between.quantile(share)) for share in (0.5, 0.95))
        speeds = [point.batch * steps / sum(values) for values in found.steps]
        other = name != reference
        taken = memory(model, point)
        rows.append(
            Served(
                name, point.batch, length, steps, first, (low, high), quartiles(speeds)[1], p50, p95,
                _over(samples, name, reference, "prefill") if other else None,
                _over(samples, name, reference, "decode") if other else None,
                taken.weights, taken.cache, None if found.extra is None else taken.weights + found.extra,
            )
        )  # fmt: skip
    return rows


def _over(samples: Mapping[str, Samples], name: str, reference: str, kind: Any) -> float:
    pairs = zip(samples[name].of(kind), samples[reference].of(kind), strict=True)
    return quartiles([a / b for a, b in pairs])[1]


def _ratio(value: float | None) -> str | None:
    return None if value is None else f"{value:.2f}"
