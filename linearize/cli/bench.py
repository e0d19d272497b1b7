"""`linearize bench A B`; suites and their reports are in `cli/suite.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import nn

from linearize.bench import benchmark
from linearize.cli import common
from linearize.cli import suite as suites
from linearize.errors import UsageError
from linearize.export.runtimes import check_runtime
from linearize.report.timing import BenchmarkResult
from linearize.serving.bench import GenerationResult, benchmark_generation

__all__ = ["bench"]

_COMPILE = {"no": [False], "yes": [True], "both": [False, True]}


# The options that suites and their reports take; a suite says all else in its file.
_OF_REPORTS = ("models", "out", "json")
_OF_SUITES = (*_OF_REPORTS, "suite", "retry", "device", "model_arg", "pretrained")


def bench(
    context: typer.Context,
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="A B | report DIR...",
            help="The reference model and the model to compare with it; or the word report and results of suites.",
        ),
    ],
    batch_sizes: Annotated[str, typer.Option(metavar="N,N,...", help="Batch sizes, separated by commas.")] = "1,32",
    generate: Annotated[
        bool,
        typer.Option("--generate", help="Measure how they generate: first token, tokens per second, and memory."),
    ] = False,
    prompts: Annotated[
        str, typer.Option(metavar="N,N,...", help="With --generate: lengths of the prompt, in tokens.")
    ] = "128",
    new_tokens: Annotated[int, typer.Option(min=1, help="With --generate: tokens that are written.")] = 32,
    rounds: Annotated[
        int, typer.Option(min=1, help="Number of measurements of each model. The models take turns.")
    ] = 15,
    warmup: Annotated[int, typer.Option(min=0, help="Number of calls before the first measurement.")] = 3,
    dtype: Annotated[
        str | None, typer.Option(help="float32, float64, bfloat16 or float16. Default: that of the models.")
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Number of CPU threads. Default: that of PyTorch.")] = None,
    compile_: Annotated[str, typer.Option("--compile", help="Measure with torch.compile: no, yes or both.")] = "no",
    runtime: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Measure in onnxruntime or openvino. Default: in PyTorch."),
    ] = None,
    device: Annotated[str | None, typer.Option(help="Device, such as cpu or cuda:0. Default: that of A.")] = None,
    shape: common.ShapeOption = None,
    model_arg: common.ModelArgument = None,
    pretrained: common.PretrainedOption = None,
    seed: common.SeedOption = 0,
    suite: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Measure a whole matrix, as this .yaml file says; needs --out.")
    ] = None,
    retry: Annotated[
        bool, typer.Option("--retry", help="With --suite: measure again what was left out before.")
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(metavar="PATH", help="Also write the result to a file, as JSON; a folder for suites and reports."),
    ] = None,
    json: common.JsonOption = False,
) -> None:
    """Measure the latency of two models in turns, and the ratio between them.

    With --suite, measure them in many settings; an interrupted suite goes on. report puts the results of several
    machines on one page.

    Example: [bold]linearize bench original.safetensors small.safetensors --batch-sizes 1,32[/bold]

    Example: [bold]linearize bench original.safetensors small.safetensors --suite gpu.yaml --out runs/gpu[/bold]

    Example: [bold]linearize bench report runs/gpu runs/cpu --out runs/all[/bold]
    """
    if models[0] == "report":
        suites.take_only(context, _OF_REPORTS, "report")
        return suites.merge(models[1:], out, json=json)
    if suite is not None:
        suites.take_only(context, _OF_SUITES, "--suite")
        return suites.suite(
            models, suite, out, arguments=model_arg, pretrained=pretrained, device=device, retry=retry, json=json
        )
    if retry:
        raise UsageError("--retry", "found without --suite", "Leave it out.")
    if len(models) != 2:
        raise UsageError("bench", f"found {len(models)} model(s)", "Name two, or pass --suite for more.")
    reference, candidate = models
    if compile_ not in _COMPILE:
        raise UsageError("--compile", f"found {compile_!r}", f"Known are {', '.join(_COMPILE)}.")
    sizes = _numbers("--batch-sizes", batch_sizes)
    a, b = common.open_pair(reference, candidate, model_arg, pretrained=pretrained, seed=seed)
    if generate:
        if compile_ != "no" or shape is not None or runtime is not None:
            found = "found with --compile, --shape or --runtime, which it does not take"
            raise UsageError("--generate", found, "Leave them out.")
        if threads is not None:
            torch.set_num_threads(threads)
        lengths, place = _numbers("--prompts", prompts), _device(device)
        kind = common.parse_dtype(dtype)
        pair = {name: _moved(model, place, kind) for name, model in (("A", a), ("B", b))}
        with common.named_as_typed():
            _show(benchmark_generation(
                pair, prompts=lengths, new_tokens=new_tokens, batch_sizes=sizes, rounds=rounds, progress=common.say
            ), out, json=json)  # fmt: skip
        return None
    result = benchmark(
        {"A": a, "B": b},
        common.inputs_for(a, batch=max(sizes), shape=shape, seed=seed),
        rounds=rounds,
        warmup=warmup,
        batch_sizes=sizes,
        dtype=common.parse_dtype(dtype),
        threads=threads,
        compile=_COMPILE[compile_],
        device=_device(device),
        runtime=_runtime(runtime),
        progress=common.say,
    )
    return _show(result, out, json=json)


def _show(result: BenchmarkResult | GenerationResult, out: Path | None, *, json: bool) -> None:
    if out is not None:
        result.save(out)
    if json:
        common.print_json(result.to_dict())
    else:
        typer.echo(str(result))


def _moved(model: nn.Module, device: str | None, dtype: torch.dtype | None) -> nn.Module:
    """The model, which is the command's own, where and as it is measured."""
    model = model if device is None else model.to(device)
    return model if dtype is None else model.to(dtype)


def _numbers(option: str, text: str) -> list[int]:
    parts = text.split(",")
    if not all(part.strip().isdigit() and int(part) for part in parts):
        raise UsageError(option, f"found {text!r}", "Write whole numbers from 1 on, for example 1,32.")
    return [int(part) for part in parts]


def _runtime(name: str | None) -> str | None:
    """A runtime's name, if it is known and installed."""
    if name is not None:
        with common.named_as_typed():
            check_runtime(name)
    return name


def _device(name: str | None) -> str | None:
    """The device's name, checked by making the smallest tensor on it."""
    if name is not None:
        try:
            torch.empty(1, device=name)
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            line = str(error).partition("\n")[0]
            raise UsageError("--device", f"cannot use {name!r} ({line})", "Leave it out to stay on the CPU.") from error
    return name
