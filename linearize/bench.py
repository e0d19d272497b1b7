"""Latency of several models: they are measured in turns, as medians with their spread, in seconds on every device."""

from __future__ import annotations

import copy
import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from linearize import checks
from linearize.errors import UsageError
from linearize.export.runtimes import runtime_of
from linearize.graph.capture import Inputs
from linearize.nest import copied, leaves_of
from linearize.report.timing import BenchmarkResult, Ratio, Timing, environment
from linearize.running.devices import check_whole
from linearize.running.models import batches_of, call, device_of, evaluating, move

__all__ = ["benchmark"]

Models = Mapping[str, nn.Module] | tuple[nn.Module, nn.Module]

# A shorter measurement, in seconds, is at the mercy of clock and scheduler: fast models repeat.
_SHORTEST = 0.02
_MOST_THREADS = 4096


def benchmark(
    models: Models,
    inputs: Any,
    *,
    rounds: int = 15,
    warmup: int = 3,
    batch_sizes: Sequence[int] | None = None,
    dtype: torch.dtype | None = None,
    threads: int | None = None,
    compile: bool | Sequence[bool] = False,  # noqa: A002 - the name by which users know torch.compile
    device: torch.device | str | None = None,
    runtime: Any = None,
    progress: Callable[[str], None] | None = None,
) -> BenchmarkResult:
    """Measure the time of one forward pass of each model, in turns, so that a busy machine affects all of them.

    Every round measures each model once. The order alternates between rounds. The ratio of two models is taken within a
    round. CUDA devices are timed by events, all others by the clock. The models are not changed.

    Args:
        models: models by name, or a pair (reference, candidate). Ratios are relative to the first one.
        inputs: one batch: a tensor, a tuple, or a dict of keyword arguments.
        rounds: number of measurements of each model.
        warmup: number of calls of each model before the first measurement.
        batch_sizes: sizes to measure. The batch is repeated or cut along its first axis. None keeps its size.
        dtype: floating type to measure in, on copies of models and inputs. None measures the models as they are.
        threads: number of CPU threads within an operation. None keeps the present number.
        compile: True measures under `torch.compile`; `[False, True]` measures both ways.
        device: where to measure. A model on another device is copied. None takes the device of the first model.
        runtime: where the models run: "onnxruntime" or "openvino", for which they are exported (docs/deploy.md); or a
            function of (model, args, kwargs) that gives a function without arguments, which runs the model once. None
            runs them in PyTorch.
        progress: a function that is called with a line of text before each series of measurements.

    Returns:
        A `BenchmarkResult`: medians and quartiles in seconds, and ratios with their quartiles.

    Raises:
        UsageError: an argument is out of range, a model does not run on the inputs, or is not on a single device.

    Examples:
        >>> small, large = nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 512), nn.Linear(512, 8))
        >>> result = benchmark((large, small), torch.randn(4, 8), rounds=3)
        >>> [timing.model for timing in result.timings]
        ['reference', 'candidate']
    """
    named = _named(models)
    checks.whole("rounds", rounds, 1)
    checks.whole("warmup", warmup)
    if threads is not None:
        checks.whole("threads", threads, 1, most=_MOST_THREADS)
    if dtype is not None:
        checks.dtype("dtype", dtype)
    if progress is not None:
        checks.function("progress", progress, "a function of a line of text")
    ways = _ways(compile)
    measured = None if runtime is None else runtime_of(runtime)
    if measured is not None and any(ways):
        raise UsageError("compile", "found beside runtime=", "Leave one of them out.")
    chosen = None if batch_sizes is None else checks.wholes("batch_sizes", batch_sizes)
    place = checks.device("device", device) if device is not None else device_of(next(iter(named.values())))
    batch = _single(inputs)
    sizes = [_batch_size(batch)] if chosen is None else list(chosen)
    ready = {name: _placed(model, place, dtype) for name, model in named.items()}
    timings: list[Timing] = []
    ratios: list[Ratio] = []
    with _threads(threads), evaluating(*ready.values()):
        for compiled in ways:
            for size in sizes:
                if progress is not None:
                    progress(f"timing {', '.join(named)} at batch size {size}" + " compiled" * compiled)
                sized = move(resized(batch, size), place, dtype)
                for name, model in ready.items():
                    call(name, model, sized)
                fresh = any(_overwrites(model, sized) for model in ready.values())
                runs = {
                    name: _bound(model, sized, compiled=compiled, fresh=fresh)
                    if measured is None
                    else measured.run(model, sized)
                    for name, model in ready.items()
                }
                samples = interleaved(runs, place, rounds, warmup)
                timings += [Timing.of(name, size, values, compiled=compiled) for name, values in samples.items()]
                ratios += _ratios(samples, size, compiled=compiled)
        facts = environment(place, dtype or _dtype_of(named)) | ({} if measured is None else {"runtime": measured.told})
    return BenchmarkResult(tuple(timings), tuple(ratios), {**facts, "rounds": rounds, "warmup": warmup})


def _named(models: Any) -> dict[str, nn.Module]:
    remedy = "Pass a pair of modules, or a dict of names and modules."
    if isinstance(models, Mapping):
        named = {str(name): model for name, model in models.items()}
    elif isinstance(models, tuple | list) and len(models) == 2:
        named = dict(zip(("reference", "candidate"), models, strict=True))
    else:
        found = f"{len(models)} of them" if isinstance(models, tuple | list) else f"a {type(models).__name__}"
        raise UsageError("models", f"found {found}", remedy)
    if not named or not all(isinstance(model, nn.Module) for model in named.values()):
        kinds = ", ".join(type(model).__name__ for model in named.values()) or "none"
        raise UsageError("models", f"found {kinds}", remedy)
    for model in named.values():
        check_whole(model, values=True)
    return named


def _ways(compiled: Any) -> list[bool]:
    """Whether to measure compiled, or not, or both."""
    found = [compiled] if isinstance(compiled, bool) else compiled
    if not isinstance(found, tuple | list) or not found or not all(isinstance(way, bool) for way in found):
        checks.refuse("compile", compiled, "True, False, or a list of these")
    return list(found)


def _single(inputs: Any) -> Inputs:
    batches = batches_of(inputs)
    if len(batches) != 1:
        found = f"found {len(batches)} batches"
        raise UsageError("inputs", found, "Pass one batch; batch_sizes= repeats or cuts it.")
    return batches[0]


def _batch_size(batch: Inputs) -> int:
    """Size of the first axis of the first tensor that has one."""
    return next((leaf.shape[0] for leaf in pytree.tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.ndim), 1)


def resized(batch: Inputs, size: int) -> Inputs:
    """The batch repeated or cut to a size, in every tensor whose first axis is the batch."""
    old = _batch_size(batch)

    def one(tensor: Tensor) -> Tensor:
        if not tensor.ndim or tensor.shape[0] != old or old == size:
            return tensor
        return tensor[torch.arange(size, device=tensor.device) % old]

    resized: Inputs = pytree.tree_map_only(Tensor, one, batch)
    return resized


def _placed(model: nn.Module, device: torch.device, dtype: torch.dtype | None) -> nn.Module:
    """The model itself if it is where and what it should be; a converted copy otherwise."""
    check_whole(model, values=True)
    tensors = (*model.parameters(), *model.buffers())
    moves = any(tensor.device != device for tensor in tensors)
    casts = dtype is not None and any(t.is_floating_point() and t.dtype != dtype for t in tensors)
    return copy.deepcopy(model).to(device=device, dtype=dtype) if moves or casts else model


def _dtype_of(named: Mapping[str, nn.Module]) -> torch.dtype:
    for model in named.values():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                return parameter.dtype
    return torch.get_default_dtype()


def _bound(model: nn.Module, batch: Inputs, *, compiled: bool, fresh: bool) -> Callable[[], Any]:
    """A call of the model on the batch; on a copy of it each time if `fresh`, which then all models pay for."""
    run: Callable[..., Any] = torch.compile(model) if compiled else model
    if not fresh:
        return partial(run, *batch[0], **batch[1])

    def once() -> Any:
        args, kwargs = copied(batch)
        return run(*args, **kwargs)

    return once


def _overwrites(model: nn.Module, batch: Inputs) -> bool:
    """Whether a model changes its inputs, so that another run would do other work."""
    given = copied(batch)
    before = [(path, getattr(leaf, "_version", 0)) for path, leaf in leaves_of(given)]
    model(*given[0], **given[1])
    return before != [(path, getattr(leaf, "_version", 0)) for path, leaf in leaves_of(given)]


def interleaved(
    runs: Mapping[str, Callable[[], Any]], device: torch.device, rounds: int, warmup: int
) -> dict[str, list[float]]:
    """Seconds per call of each model, one value per round."""
    numbers = {}
    for name, run in runs.items():
        for _ in range(warmup):
            run()
        numbers[name] = max(1, round(_SHORTEST / max(_measure(run, 1, device), 1e-9)))
    samples: dict[str, list[float]] = {name: [] for name in runs}
    names = list(runs)
    for position in range(rounds):
        for name in names if position % 2 == 0 else names[::-1]:
            samples[name].append(_measure(runs[name], numbers[name], device))
    return samples


def _measure(run: Callable[[], Any], number: int, device: torch.device) -> float:
    """Mean seconds per call over `number` calls in a row."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        if device.type == "cuda":
            return _measure_events(run, number, device)
        _wait(device)
        start = time.perf_counter()
        for _ in range(number):
            run()
        _wait(device)
        return (time.perf_counter() - start) / number
    finally:
        if enabled:
            gc.enable()


def _measure_events(run: Callable[[], Any], number: int, device: torch.device) -> float:
    with torch.cuda.device(device):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        for _ in range(number):
            run()
        end.record()
        torch.cuda.synchronize()
        return float(start.elapsed_time(end)) / 1e3 / number


def _wait(device: torch.device) -> None:
    """Wait for an accelerator that is not CUDA to finish what it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _ratios(samples: Mapping[str, list[float]], size: int, *, compiled: bool) -> list[Ratio]:
    """Every other model against the first, round by round."""
    first, *others = samples
    return [
        Ratio.of(
            name, first, size, [a / b for a, b in zip(samples[name], samples[first], strict=True)], compiled=compiled
        )
        for name in others
    ]


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    try:
        if count is not None:
            torch.set_num_threads(count)
        yield
    finally:
        torch.set_num_threads(before)
