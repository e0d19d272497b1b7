"""Wrong calls: every argument of the public functions with values that cannot be meant."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import linearize
from benchmarks.stress import toys

__all__ = ["calls"]


class _Mute:
    """Something that cannot even be shown."""

    def __repr__(self) -> str:
        raise RuntimeError("no words")


_NAN = float("nan")
_HUGE = 10**400  # that no float can be
_MUTE = _Mute()
_COUNTS: tuple[Any, ...] = ("3", 1.5, -1, 10**30, _NAN, [1], True)
_SHARES: tuple[Any, ...] = ("x", -0.1, 1.1, _NAN, [0.5], True, _HUGE)
_NUMBERS: tuple[Any, ...] = ("x", -1, _NAN, float("inf"), [1.0], torch.ones(2), _HUGE, -_HUGE, _MUTE)
_SWITCHES: tuple[Any, ...] = (1, "yes", None, [], _MUTE)
_WORDS: tuple[Any, ...] = ("nonsense", 3, None, ["no"], torch.ones(2))
_MODULES: tuple[Any, ...] = (None, "x", 5, nn.Linear, torch.relu)
_PATHS: tuple[Any, ...] = (5, None, "a\0b", b"x", ["x"], "")
_PATTERNS: tuple[Any, ...] = (5, [5], {"a": 1}, b"x", torch.tensor(1.0))

_FINETUNE: dict[str, tuple[Any, ...]] = {
    "epochs": (*_COUNTS, 0, None),
    "distill_weight": _SHARES,
    "temperature": (*_NUMBERS, 0),
    "lr": _NUMBERS,
    "gate_lr": _NUMBERS,
    "weight_decay": _NUMBERS,
    "warmup": _SHARES,
    "clip": (*_NUMBERS, 0),
    "mixed_precision": ("nonsense", 3, ["no"]),  # None is accelerate's
    "accumulate": (*_COUNTS, 0),
    "keep_norms": _SWITCHES,
    "torch_compile": ("inductor", 1, None),
    "on_step": (5, "x"),
    "steps_per_epoch": (*_COUNTS, 0),
    "checkpoint_dir": (5, "a\0b", b"x", __file__, f"{__file__}/x"),
    "keep": (*_COUNTS[:5], 0),
    "resume": (*_SWITCHES, True),
    "seed": ("x", 1.5, -1, 2**64),
    "progress": _SWITCHES,
    "teacher": _MODULES[1:],
    "loss": (5, "mse"),
    "prior": (5, "paper"),
    "evaluate": (5, "x", torch.ones(2)),
    "on_epoch": (5, "x"),
    "accelerator": (5, "cpu"),
    "features": (5, "0", torch.tensor(1.0)),
}
_COMPRESS: dict[str, tuple[Any, ...]] = {
    "flops": (*_SHARES, 0, None),
    "speedup": (*_NUMBERS, 0.5),
    "linear": (0.5, "x"),
    "plan": ("{}", 5),
    "finetune": ("x", 1.5, 0, -1, {"nonsense": 1}, {"prior": None}, {5: 5}, {"epochs": "3"}, {"lr": "x"}, {"clip": -1}),
    "evaluate": (5, "x", {"a": 1}),
    "distill": _SWITCHES,
    "include": (*_PATTERNS, "nowhere"),
    "exclude": (*_PATTERNS, "nowhere"),
    "dry_run": _SWITCHES,
    "sequential": _SWITCHES,
    "search": _COUNTS,
    "uniform": (5, None, ["nowhere"], [5], {"a": 1}),
    "stock": _SWITCHES,
    "modules": _SWITCHES,
    "round_to": (*_COUNTS, 0),
    "when": _WORDS,
    "batch_sizes": ("ab", [], [0], ["1"], [1.5], 0, {"a": 1}, torch.tensor(1), torch.ones(2, device="meta")),
    "rounds": _COUNTS,
    "cache": (5, None, ["x"]),
    "checkpoint_dir": (5, __file__, "a\0b", b"x"),
    "seed": ("x", 1.5, -1, None, 2**64),
    "progress": (1, None, "x"),
    "example_inputs": (5, "x", {"nonsense": torch.ones(2)}),
}
_BENCHMARK: dict[str, tuple[Any, ...]] = {
    "rounds": (*_COUNTS, 0),
    "warmup": _COUNTS,
    "batch_sizes": ("ab", [], [0], ["1"], [1.5], 0),
    "dtype": ("float64", 5, torch.int8, float),
    "threads": (*_COUNTS, 0),
    "compile": ("yes", [], [1], None),
    "device": ("abacus", "meta", 5.5, [], "cuda:99"),
    "progress": (5, "x"),
}
_PRIOR: dict[str, tuple[Any, ...]] = {
    "kind": _WORDS,
    "weight": _NUMBERS,
    "p": (*_NUMBERS, 0),
    "target": (*_SHARES, 0),
    "steps": (*_COUNTS, 0),
    "schedule": _WORDS,
    "ramp": (*_SHARES, 1),
    "by": _WORDS,
    "cost_weighted": _SWITCHES,
    "calibration": (5, "x", {}),
    "tolerance": (*_NUMBERS, 0, 1),
    "together": (*_WORDS, "sites"),
}

Call = tuple[str, Callable[[], object]]


def calls(folder: Path) -> Iterator[Call]:
    """Every wrong call with its name; each must be an error of linearize. Files may only be written in `folder`."""
    x = toys.unlabelled()[0]

    def finetune(**options: Any) -> object:
        return linearize.finetune(toys.network(), toys.data(), **{"progress": False, **options})

    def compress(**options: Any) -> object:
        quiet = {"flops": 0.6, "search": 0, "rounds": 0, "cache": False, "progress": False}
        return linearize.compress(toys.network(), toys.data(), **{**quiet, **options})

    def benchmark(**options: Any) -> object:
        return linearize.benchmark((toys.network(), toys.network()), x, **{"rounds": 1, **options})

    def prior(**options: Any) -> object:
        fitting = (
            {"kind": "target", "target": 0.5, "steps": 3}
            if {"target", "steps", "schedule", "ramp"} & set(options)
            else {}
        )
        fitting |= {"kind": "target", "target": 0.5, "steps": 3} if options.get("together") == "sites" else {}
        fitting |= {"kind": "target", "target": 0.5, "steps": 3} if "calibration" in options else {}
        return linearize.SparsityPrior(_gated(x), **{**fitting, **options})

    tables = {"finetune": (finetune, _FINETUNE), "compress": (compress, _COMPRESS)}
    tables |= {"benchmark": (benchmark, _BENCHMARK), "SparsityPrior": (prior, _PRIOR)}
    for name, (function, table) in tables.items():
        for argument, values in table.items():
            for value in values:
                yield _told(name, argument, value), _with(function, argument, value)
    yield from _modules(x, folder)
    yield from _rest(x)


def _with(function: Callable[..., object], argument: str, value: Any) -> Callable[[], object]:
    return lambda: function(**{argument: value})


def _told(name: str, argument: str, value: Any) -> str:
    shown = "a thing without words" if value is _MUTE else f"{value!r:.40}"
    return f"{name}({argument}={shown})".replace("\n", " ")


def _gated(_: Tensor) -> nn.Module:
    return toys.gated()


def _modules(x: Tensor, folder: Path) -> Iterator[Call]:
    """Something else than a model."""
    functions: dict[str, Callable[[Any], object]] = {
        "convert": lambda m: linearize.convert(m, x),
        "collapse": linearize.collapse,
        "calibrate": lambda m: linearize.calibrate(m, [x]),
        "summary": linearize.summary,
        "finetune": lambda m: linearize.finetune(m, toys.data(), progress=False),
        "compress": lambda m: linearize.compress(m, toys.data(), flops=0.5, progress=False),
        "benchmark": lambda m: linearize.benchmark((m, toys.network()), x),
        "verify": lambda m: linearize.verify(m, toys.network(), x),
        "SparsityPrior": linearize.SparsityPrior,
        "param_groups": linearize.param_groups,
        "save": lambda m: linearize.save(m, folder / "x.safetensors"),
        "average_path_length": lambda m: linearize.average_path_length(m, x),
        "functional_dimension": lambda m: linearize.functional_dimension(m, x),
        "hidden_symmetries": lambda m: linearize.hidden_symmetries(m, x),
        "reduce": lambda m: linearize.reduce(m, []),
    }
    for name, function in functions.items():
        for value in _MODULES:
            yield _told(name, "model", value), _called(function, value)


def _called(function: Callable[[Any], object], value: Any) -> Callable[[], object]:
    return lambda: function(value)


def _rest(x: Tensor) -> Iterator[Call]:
    for value in _PATHS:
        yield _told("save", "path", value), _called(lambda path: linearize.save(toys.network(), path), value)
        yield _told("load", "path", value), _called(lambda path: linearize.load(path, model=toys.network()), value)
    for value in (*_PATTERNS, "nowhere"):
        for argument in ("include", "exclude"):
            made = _with(lambda **more: linearize.convert(toys.network(), x, **more), argument, value)
            yield _told("convert", argument, value), made
    for value in _WORDS:
        yield _told("collapse", "when", value), _called(lambda when: linearize.collapse(_half(x), when=when), value)
    for value in (5, "x", {}):
        yield _told("collapse", "plan", value), _called(lambda plan: linearize.collapse(_half(x), plan=plan), value)
    for value in (5, "x", None, {"a": 1}, x, x.numpy()):
        yield _told("calibrate", "batches", value), _called(lambda data: linearize.calibrate(_gated(x), data), value)
        yield _told("compress", "data", value), _called(_compressed, value)
        yield _told("finetune", "data", value), _called(_finetuned, value)
    for value in _SWITCHES:
        yield (
            _told("convert", "inplace", value),
            _called(lambda on: linearize.convert(toys.network(), x, inplace=on), value),
        )
    for value in (-1, _NAN, "x", [1], _MUTE):
        made = _called(lambda few: linearize.verify(toys.network(), toys.network(), x, tolerance=few), value)
        yield _told("verify", "tolerance", value), made
    yield from _gates(x)
    yield from _analyses(x)
    yield "compress in inference_mode", lambda: _in_mode(torch.inference_mode())
    yield "compress on the meta device", lambda: _in_mode(torch.device("meta"))
    yield (
        "compress a model without values",
        lambda: linearize.compress(toys.network().to("meta"), toys.data(), flops=0.5, progress=False),
    )
    for models in ((), (toys.network(),), (toys.network(),) * 3, {}, {"a": 5}, 5, "ab"):
        yield _told("benchmark", "models", type(models)), _called(lambda some: linearize.benchmark(some, x), models)


def _gates(x: Tensor) -> Iterator[Call]:
    for name in ("alpha", "slope", "frozen"):
        for shape in ((1,), (32, 1), (31,), ()):
            for step in (linearize.collapse, linearize.SparsityPrior, linearize.summary):
                yield f"{step.__name__} with {name} of shape {shape}", _reshaped(step, x, name, shape)


def _analyses(x: Tensor) -> Iterator[Call]:
    hollow = torch.empty(3, 8, device="meta")
    for function in (linearize.functional_dimension, linearize.hidden_symmetries):
        yield f"{function.__name__} of inputs without values", _called(_looked_at(function), hollow)
    for value in (5, None, ["no"], x, x.numpy()):
        made = _called(lambda how: linearize.average_path_length(toys.network(), x, weighting=how), value)
        yield _told("average_path_length", "weighting", value), made


def _looked_at(function: Callable[..., object]) -> Callable[[Any], object]:
    return lambda inputs: function(toys.network(), inputs)


def _compressed(data: Any) -> object:
    return linearize.compress(toys.network(), data, flops=0.5, rounds=0, progress=False)


def _finetuned(data: Any) -> object:
    return linearize.finetune(toys.network(), data, progress=False)


def _half(x: Tensor) -> nn.Module:
    gated = _gated(x)
    for gate in linearize.gates(gated).values():
        gate.linearize_(torch.arange(gate.channels) < gate.channels // 2)
    return gated


def _reshaped(
    step: Callable[[nn.Module], object], x: Tensor, name: str, shape: tuple[int, ...]
) -> Callable[[], object]:
    def call() -> object:
        gated = _half(x)
        gate = next(iter(linearize.gates(gated).values()))
        old = getattr(gate, name)
        new = torch.ones(shape, dtype=old.dtype)
        setattr(gate, name, nn.Parameter(new) if isinstance(old, nn.Parameter) else new)
        return step(gated)

    return call


def _in_mode(mode: Any) -> object:
    model, data = toys.network(), toys.data()
    with mode:
        return linearize.compress(model, data, flops=0.5, rounds=0, progress=False)
