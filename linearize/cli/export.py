"""`linearize export FILE --format F`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from linearize.cli import common
from linearize.errors import UsageError
from linearize.export import registry
from linearize.export.verb import export as export_model
from linearize.storage.folders import make_folder

__all__ = ["export"]


def export(
    model: common.Model,
    format_: Annotated[str, typer.Option("--format", metavar="FORMAT", help=f"One of {', '.join(registry.FORMATS)}.")],
    out: Annotated[
        Path | None,
        typer.Option(metavar="PATH", help="File or folder to write; without: named as the model, in this folder."),
    ] = None,
    batch: common.BatchOption = 2,
    shape: common.ShapeOption = None,
    check: Annotated[
        bool, typer.Option("--check/--no-check", help="Run the file in its runtime, and keep it only if it is right.")
    ] = True,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")] = False,
    tolerance: Annotated[
        float | None, typer.Option(help="Largest relative error in the runtime; without: that of the format.")
    ] = None,
    opset: Annotated[int | None, typer.Option(min=18, help="ONNX: version of the operators.")] = None,
    external_data: Annotated[
        bool | None, typer.Option("--external-data/--one-file", help="ONNX: weights in a file beside.")
    ] = None,
    cache: Annotated[
        bool, typer.Option("--cache", help="ONNX: one step of a model that generates, with keys and values.")
    ] = False,
    tokenizer: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="GGUF: folder of the tokenizer; without: numbers for words.")
    ] = None,
    card: Annotated[bool, typer.Option("--card", help="Write a model card, too.")] = False,
    model_arg: common.ModelArgument = None,
    pretrained: common.PretrainedOption = None,
    seed: common.SeedOption = 0,
    json: common.JsonOption = False,
) -> None:
    """Write a model for another program's runtime, run it there, and keep the file only if it is the same function.

    Example: [bold]linearize export small.safetensors --format onnx[/bold]

    Example: [bold]linearize export small.safetensors --format openvino --out deploy/small.xml[/bold]
    """
    if format_ not in registry.FORMATS:
        raise UsageError("--format", f"found {format_!r}", f"Known are {', '.join(registry.FORMATS)}.")
    target = out if out is not None else Path(_stem(model) + (registry.FORMATS[format_].suffix or f"-{format_}"))
    network = common.open_model(model, model_arg, pretrained=pretrained, seed=seed).eval()
    if out is not None:
        make_folder(target.absolute().parent)
    with common.named_as_typed():
        made = export_model(
            network,
            target,
            format=format_,
            example_inputs=common.inputs_for(network, batch=batch, shape=shape, seed=seed),
            check=check,
            overwrite=overwrite,
            tolerance=tolerance,
            opset=opset,
            external_data=external_data,
            cache=cache or None,
            tokenizer=tokenizer,
            card=card,
        )
    if json:
        common.print_json(made.to_dict())
    else:
        typer.echo(str(made))


def _stem(model: str) -> str:
    """A file's name, from what the user typed."""
    name = Path(model.rpartition(":")[2]).name
    return name.removesuffix(".safetensors") or "model"
