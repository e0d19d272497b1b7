"""Layers that are run by themselves: in PyTorch, or in the runtime that the model is for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from linearize.bench import interleaved
from linearize.export.runtimes import Runtime

__all__ = ["LayerCall", "interpolated", "runnable", "seconds_of", "spread"]

LayerCall = Callable[[], Any]

_NOTHING = "nothing"


def runnable(layer: nn.Module, x: Tensor, runtime: Runtime | None, keyword: str = "") -> LayerCall:
    """A call of a layer on a tensor.

    Args:
        layer: in eval mode.
        x: its input.
        runtime: where it runs; None for PyTorch.
        keyword: the name under which it takes its input; "" if by place.
    """
    args, kwargs = ((), {keyword: x}) if keyword else ((x,), {})
    return partial(layer, *args, **kwargs) if runtime is None else runtime.run(layer, (args, kwargs))


def seconds_of(runs: Mapping[str, LayerCall], x: Tensor, rounds: int, runtime: Runtime | None) -> dict[str, Tensor]:
    """Seconds of every call, one for each round, in turns.

    In another runtime a call costs something whatever is called, which layers in a model do not pay: that of a layer
    which does nothing is measured, too, and taken off.

    Args:
        runs: calls by name.
        x: what they are called on.
        rounds: measurements of each.
        runtime: where they run; None for PyTorch.

    Examples:
        >>> x = torch.ones(2)
        >>> found = seconds_of({"one": lambda: x + 1}, x, 3, None)
        >>> found["one"].shape, bool((found["one"] > 0).all())
        (torch.Size([3]), True)
    """
    if runtime is None:
        return _tensors(interleaved(runs, x.device, rounds, 2))
    samples = _tensors(interleaved({_NOTHING: runtime.run(nn.Identity(), ((x,), {})), **runs}, x.device, rounds, 2))
    idle = samples.pop(_NOTHING).median()
    return {name: (values - idle).clamp_min(0) for name, values in samples.items()}


def spread(sizes: Sequence[float], most: int) -> list[int]:
    """Positions of at most so many of some sizes, which are as far apart as they can be; the ends are among them.

    Examples:
        >>> spread([1.0, 0.1, 0.55, 0.5, 0.4], 3)
        [0, 1, 2]
    """
    ranked = sorted(range(len(sizes)), key=lambda i: sizes[i])
    if len(ranked) <= most:
        return sorted(ranked)
    low, high = sizes[ranked[0]], sizes[ranked[-1]]
    wanted = [low + (high - low) * k / max(1, most - 1) for k in range(most)]
    return sorted({min(ranked, key=lambda i: (abs(sizes[i] - size), i)) for size in wanted})


def interpolated(sizes: Sequence[float], known: Mapping[int, float]) -> list[float]:
    """Times for all sizes from those of some: time per size runs straight from one to the next that is known.

    Args:
        sizes: what times are about in proportion to, such as FLOPs.
        known: times by position.

    Examples:
        >>> [round(time, 3) for time in interpolated([1.0, 0.5, 0.75, 0.25], {0: 1.0, 1: 0.6, 3: 0.3})]
        [1.0, 0.6, 0.825, 0.3]
    """
    measured = sorted((sizes[i], time / max(sizes[i], 1e-9)) for i, time in known.items())
    per_size = np.interp(sizes, [size for size, _ in measured], [slope for _, slope in measured])
    return [known.get(i, float(size * per_size[i])) for i, size in enumerate(sizes)]


def _tensors(samples: Mapping[str, list[float]]) -> dict[str, Tensor]:
    return {name: torch.tensor(values, dtype=torch.float64) for name, values in samples.items()}
