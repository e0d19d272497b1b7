"""Which share of a model's time its parts take, measured inside the model, where caches behave as in real use."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from linearize.bench import resized
from linearize.running.models import batches_of, device_of, evaluating, move

__all__ = ["TimeShares", "shares_in_place", "shares_of"]

TimeShares = dict[str, dict[int, float]]
"""By name of the part and batch size."""

_WARMUP = 2
_RUNS_PER_ROUND = 3


def shares_in_place(
    model: nn.Module, batch: Any, sizes: Sequence[int], parts: Mapping[str, Sequence[str]], *, rounds: int
) -> TimeShares:
    """Shares of a forward pass's time from the first module of each part to the last; medians over runs.

    Args:
        model: any.
        batch: one.
        sizes: of batches.
        parts: paths of modules, by name; a part of which one is not called exactly once is left out.
        rounds: a third of the number of runs.

    Examples:
        >>> model = nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 256))
        >>> found = shares_in_place(model, torch.randn(4, 256), [4], {"first": ["0"], "all": ["0", "2"]}, rounds=3)
        >>> found["first"][4] < found["all"][4] <= 1
        True
    """
    batches = {size: resized(batches_of(batch)[0], size) for size in sizes}

    def fresh(size: int) -> Callable[[], Any]:
        args, kwargs = move(batches[size], device_of(model))  # anew: a model may overwrite it
        return lambda: model(*args, **kwargs)

    return shares_of(model, {size: partial(fresh, size) for size in sizes}, parts, rounds=rounds)


def shares_of(
    model: nn.Module,
    runs: Mapping[int, Callable[[], Callable[[], Any]]],
    parts: Mapping[str, Sequence[str]],
    *,
    rounds: int,
) -> TimeShares:
    """Shares of time per part, as of `shares_in_place`, for any function that runs the model.

    Args:
        model: any.
        runs: by batch size, what gives a new run each time it is called; getting ready is not measured.
        parts: paths of modules, by name.
        rounds: a third of the number of runs.
    """
    found: TimeShares = {name: {} for name in parts}
    clock = _Clock(device_of(model))
    with evaluating(model):
        handles = clock.watch(model, {path for paths in parts.values() for path in paths})
        try:
            for size, fresh in runs.items():
                times: dict[str, list[float]] = {name: [] for name in parts}
                for run in range(_WARMUP + _RUNS_PER_ROUND * rounds):
                    whole = clock.run(fresh())
                    for name, paths in parts.items() if run >= _WARMUP else ():
                        if paths and all(len(clock.starts.get(path, ())) == 1 for path in paths):
                            times[name].append(clock.span(paths) / max(whole, 1e-12))
                for name, values in times.items():
                    if values:
                        found[name][size] = float(torch.tensor(values).median())
        finally:
            for handle in handles:
                handle.remove()
    return found


class _Clock:
    """Marks in time at the start and the end of modules; on CUDA events, elsewhere the time of day."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.starts: dict[str, list[Any]] = {}
        self.ends: dict[str, list[Any]] = {}

    def watch(self, model: nn.Module, paths: set[str]) -> list[Any]:
        """Put hooks on modules, and return their handles."""
        handles: list[Any] = []
        for path in paths:
            module = model.get_submodule(path)
            handles.append(module.register_forward_pre_hook(self._note(self.starts, path)))
            handles.append(module.register_forward_hook(self._note(self.ends, path)))
        return handles

    def _note(self, marks: dict[str, list[Any]], path: str) -> Callable[..., None]:
        def see(*_: Any) -> None:
            marks.setdefault(path, []).append(self._mark())

        return see

    def run(self, call: Callable[[], Any]) -> float:
        """Seconds of a call, in which modules leave their marks."""
        self.starts.clear()
        self.ends.clear()
        self._wait()
        start = self._mark()
        call()
        end = self._mark()
        self._wait()
        return self._between(start, end)

    def span(self, paths: Sequence[str]) -> float:
        """Seconds from the start of the first of some modules to the end of the last."""
        first = self.starts[paths[0]][0]
        starts = [self._between(first, self.starts[path][0]) for path in paths]
        return max(self._between(first, self.ends[path][0]) for path in paths) - min(starts)

    def _mark(self) -> Any:
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(self.device))
            return event
        self._wait()
        return time.perf_counter()

    def _wait(self) -> None:
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)

    def _between(self, start: Any, end: Any) -> float:
        if self.device.type == "cuda":
            return float(start.elapsed_time(end)) / 1e3
        return float(end - start)
