"""Times of several models that generate, measured in turns: a busy machine slows all of them alike."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import nn

from linearize.report.timing import quartiles
from linearize.running.models import evaluating
from linearize.serving.decoder import Decoder
from linearize.serving.point import Point

__all__ = ["Samples", "decode_in_turns", "ratio_of"]

_WARMUP = 1
_PREFILLS = 3  # in a round


@dataclass
class Samples:
    """Seconds that one model took, a list for each round.

    Attributes:
        prefill: from the prompt to the scores of the first token, several times.
        steps: of each token after it.
        extra: bytes that a round took at its worst moment besides what was there before; None where no device tells.
    """

    prefill: list[list[float]] = field(default_factory=list)
    steps: list[list[float]] = field(default_factory=list)
    extra: int | None = None

    def of(self, kind: Literal["prefill", "decode"]) -> list[float]:
        """A value for each round, of the time to the first token or of the tokens after it: the lower quartile.

        Every step does the same work. What makes some of them slower is not the model: another program had the
        processor.
        """
        return [quartiles(values)[0] for values in (self.prefill if kind == "prefill" else self.steps)]


def decode_in_turns(
    models: Mapping[str, nn.Module], point: Point, *, rounds: int, steps: int | None = None, warmup: int = _WARMUP
) -> dict[str, Samples]:
    """Measure every model once in each round; the order alternates between rounds.

    Args:
        models: by name.
        point: batch size and context.
        rounds: number of measurements of each model.
        steps: tokens after the prompt; None takes 8, or fewer for a short context.
        warmup: rounds before those that count.
    """
    samples = {name: Samples() for name in models}
    with evaluating(*models.values()), _without_collecting():
        decoders = {name: Decoder(model, point, steps) for name, model in models.items()}
        for position in range(-warmup, rounds):
            for name in list(models) if position % 2 == 0 else list(models)[::-1]:
                device, before = decoders[name].prompt.device, _allocated(decoders[name].prompt.device)
                first = [decoders[name].seconds_of_prefill() for _ in range(_PREFILLS)]
                rest = decoders[name].seconds_of_steps()
                if before is not None:
                    extra = torch.cuda.max_memory_allocated(device) - before
                    samples[name].extra = max(samples[name].extra or 0, extra)
                if position >= 0:
                    samples[name].prefill.append(first)
                    samples[name].steps.append(rest)
    return samples


def _allocated(device: torch.device) -> int | None:
    """Bytes in use on a device that counts them, from where on it remembers the most; None for others."""
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


@contextmanager
def _without_collecting() -> Iterator[None]:
    """Inside, no garbage is collected, which would take its time from whatever runs just then."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def ratio_of(
    reference: nn.Module, candidate: nn.Module, point: Point, kind: Literal["prefill", "decode"], rounds: int
) -> float:
    """The median over rounds of a time of a model over that of another."""
    found = decode_in_turns({"reference": reference, "candidate": candidate}, point, rounds=rounds)
    pairs = zip(found["candidate"].of(kind), found["reference"].of(kind), strict=True)
    return quartiles([a / b for a, b in pairs])[1]
