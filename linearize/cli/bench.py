"""`linearize bench A B`; suites and their reports are in `cli/suite.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from linearize.bench import benchmark
from linearize.cli import common
from linearize.cli import suite as suites
from linearize.errors import UsageError

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
    rounds: Annotated[
        int, typer.Option(min=1, help="Number of measurements of each model. The models take turns.")
    ] = 15,
    warmup: Annotated[int, typer.Option(min=0, help="Number of calls before the first measurement.")] = 3,
    dtype: Annotated[
        str | None, typer.Option(help="float32, float64, bfloat16 or float16. Default: that of the models.")
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Number of CPU threads. Default: that of PyTorch.")] = None,
    compile_: Annotated[str, typer.Option("--compile", help="Measure with torch.compile: no, yes or both.")] = "no",
    device: Annotated[str | None, typer.Option(help="Device, such as cpu or cuda:0. Default: that of A.")] = None,
    shape: common.Shape = None,
    model_arg: common.ModelArgument = None,
    pretrained: common.Pretrained = None,
    seed: common.Seed = 0,
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
    json: common.Json = False,
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
    sizes = _numbers(batch_sizes)
    a, b = common.open_pair(reference, candidate, model_arg, pretrained=pretrained, seed=seed)
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
        progress=common.say,
    )
    if out is not None:
        result.save(out)
    if json:
        common.print_json(result.to_dict())
    else:
        typer.echo(str(result))
    return None


def _numbers(text: str) -> list[int]:
    parts = text.split(",")
    if not all(part.strip().isdigit() and int(part) for part in parts):
        raise UsageError("--batch-sizes", f"found {text!r}", "Write whole numbers from 1 on, for example 1,32.")
    return [int(part) for part in parts]


def _device(name: str | None) -> str | None:
    """The device's name, checked by making the smallest tensor on it."""
    import torch

    if name is not None:
        try:
            torch.empty(1, device=name)
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            line = str(error).partition("\n")[0]
            raise UsageError("--device", f"cannot use {name!r} ({line})", "Leave it out to stay on the CPU.") from error
    return name
