"""Generation step by step, with the cache that the model itself makes.

Shape letters: B texts, T tokens of the prompt.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from linearize.errors import UsageError
from linearize.running.models import device_of
from linearize.serving.point import Point
from linearize.zoo.caches import cache_in, reading
from linearize.zoo.text import vocabulary

__all__ = ["Decoder", "prompt"]

STEPS = 8  # tokens that are decoded at a time


def prompt(model: nn.Module, point: Point) -> Tensor:
    """Token ids (B, T) that are always the same; all models read the same ones."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(vocabulary(model) or 2, (point.batch, point.context), generator=generator)


class Decoder:
    """A model that reads a prompt, and then token after token.

    The tokens are given, so that all models do the same work. The last ones end at the context of the point.

    Args:
        model: in eval mode, and without gradients, as its caller sees to.
        point: batch size and context.
        steps: tokens after the prompt; None takes 8, or fewer for a short context.
    """

    def __init__(self, model: nn.Module, point: Point, steps: int | None = None) -> None:
        self.model, self.point = model, point
        self.steps = min(STEPS, point.context // 2) if steps is None else steps
        ids = prompt(model, point).to(device_of(model))
        self.prompt, self.rest = ids[:, : -self.steps], ids[:, -self.steps :]
        self._cache: Any = None

    def prefill(self) -> Any:
        """Read the prompt; gives what the model keeps.

        Raises:
            UsageError: it keeps nothing, or does not run.
        """
        try:
            output = self.model(**reading(self.model, self.prompt))
        except (RuntimeError, TypeError, ValueError, IndexError, AttributeError) as error:
            line = next((text.strip() for text in str(error).splitlines() if text.strip()), "no message")
            found = f"cannot read {self.point.context} tokens ({type(error).__name__}: {line})"
            raise UsageError(type(self.model).__name__, found, "Pass a decoder that reads text alone.") from error
        kept = cache_in(output)
        if kept is None:
            found = "keeps no cache from step to step"
            raise UsageError(type(self.model).__name__, found, "Pass a model with use_cache in its configuration.")
        return kept

    def fresh(self) -> Any:
        """The cache behind the prompt, which the caller may write to."""
        if self._cache is None:
            self._cache = self.prefill()
        return copy.deepcopy(self._cache)

    def step(self, cache: Any, index: int) -> Any:
        """Read one token. The cache grows."""
        return self.model(**reading(self.model, self.rest[:, index : index + 1], cache))

    def seconds_of_steps(self) -> list[float]:
        """Seconds of each token behind the prompt."""
        cache, device = self.fresh(), self.prompt.device
        return [decode_seconds(partial(self.step, cache, index), device) for index in range(self.steps)]

    def seconds_of_prefill(self) -> float:
        """Seconds from the prompt to the scores of the first token."""
        return decode_seconds(self.prefill, self.prompt.device)


def decode_seconds(call: Callable[[], Any], device: torch.device) -> float:
    """Seconds of a call, until the device is done with it."""
    wait(device)
    start = time.perf_counter()
    call()
    wait(device)
    return time.perf_counter() - start


def wait(device: torch.device) -> None:
    """Wait for a device to finish what it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
