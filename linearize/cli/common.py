"""What all commands use: opening the model that a user names, making inputs for it, and printing results."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import torch
import typer
from torch import nn

from linearize import zoo
from linearize.checkpoint import load
from linearize.data import DataSource, load_data
from linearize.errors import CaptureError, UsageError
from linearize.sites.record import record_of
from linearize.zoo.building import affordable, parameters_on_meta
from linearize.zoo.images import image_format

__all__ = [
    "BatchOption",
    "JsonOption",
    "Model",
    "ModelArgument",
    "PretrainedOption",
    "SeedOption",
    "ShapeOption",
    "data_for",
    "inputs_for",
    "named_as_typed",
    "open_hollow",
    "open_model",
    "open_pair",
    "parse_dtype",
    "print_json",
    "say",
    "test_inputs",
]

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help="timm:NAME, hf:FOLDER_OR_NAME, package.module:callable, or a file that linearize saved."
    ),
]
ModelArgument = Annotated[
    list[str] | None,
    typer.Option(
        "--model-arg",
        "-a",
        metavar="KEY=VALUE",
        help="One argument of the model, such as num_classes=10. Can be repeated.",
    ),
]
PretrainedOption = Annotated[
    bool | None,
    typer.Option("--pretrained/--random", help="Weights of a new model. Default: random for timm, pretrained for hf."),
]
ShapeOption = Annotated[
    str | None,
    typer.Option(
        metavar="SHAPE",
        help="Shape of one input sample, such as 3x224x224. Needed only if linearize cannot find it out.",
    ),
]
BatchOption = Annotated[int, typer.Option(min=1, help="Number of samples in a batch.")]
SeedOption = Annotated[int, typer.Option(min=0, help="Seed of random weights, inputs and orders.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


def say(text: str) -> None:
    """Print a line of progress on standard error."""
    typer.echo(text, err=True)


@contextmanager
def named_as_typed() -> Iterator[None]:
    """Inside this context, an error about an argument of a function names the option of the command."""
    try:
        yield
    except UsageError as error:
        if not error.where.isidentifier() or error.where == "compress":
            raise
        raise UsageError(f"--{error.where.replace('_', '-')}", error.found, error.remedy) from error


def print_json(data: Any) -> None:
    """Plain data as JSON on standard output."""
    typer.echo(json.dumps(data, indent=1))


def open_model(
    spec: str,
    arguments: list[str] | None = None,
    *,
    pretrained: bool | None = None,
    seed: int = 0,
    **more: Any,
) -> nn.Module:
    """Open the model that a user names. Random weights depend on the seed.

    Args:
        spec: as `zoo.create` takes it, or the path of a file that `linearize.save` wrote.
        arguments: texts KEY=VALUE; a value is JSON, or text as it stands.
        pretrained: as `zoo.create` takes it.
        seed: of the random weights.
        **more: arguments that those of the user override.

    Raises:
        LinearizeError: there is no such model.
    """
    kwargs = {**more, **dict(_argument(text) for text in arguments or [])}
    if spec.endswith(".safetensors") and kwargs:
        raise UsageError("--model-arg", "found with a file, which fixes its model", "Leave it out.")
    if spec.endswith(".safetensors"):
        return load(spec)
    torch.manual_seed(seed)
    return zoo.create(spec, **({} if pretrained is None else {"pretrained": pretrained}), **kwargs)


def open_hollow(spec: str, arguments: list[str] | None = None, *, pretrained: bool | None = None) -> nn.Module | None:
    """Open the model on the meta device, without weights. This takes no time and no memory, for any size.

    None where that is impossible (a file or a callable may hold linear channels already, which the weights tell), or
    where weights are asked for.
    """
    if not spec.startswith(("timm:", "hf:")) or pretrained:
        return None
    with parameters_on_meta():
        model = zoo.create(spec, pretrained=False, **dict(_argument(text) for text in arguments or []))
    return model.to("meta")


def _argument(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key.isidentifier():
        raise UsageError("--model-arg", f"found {text!r}", "Write KEY=VALUE, for example num_classes=10.")
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value


def inputs_for(model: nn.Module, *, batch: int, shape: str | None = None, seed: int = 0) -> Any:
    """Random example inputs: of the given shape, or as the model's library or its file says.

    Raises:
        UsageError: the shape is not like 3x224x224, or it is needed and not given.
    """
    torch.manual_seed(seed)
    if shape is not None:
        return torch.randn(batch, *_sizes(shape))
    try:
        args, kwargs = zoo.example_inputs(model, batch=batch)
        return kwargs if kwargs and not args else args
    except CaptureError as error:
        record = record_of(model)
        stored = _stored_inputs(record.inputs if record is not None else None, batch)
        if stored is not None:
            return stored
        raise UsageError(error.where, error.found, "Pass --shape, for example --shape 3x224x224.") from error


def _sizes(shape: str) -> list[int]:
    parts = shape.lower().replace(",", "x").split("x")
    if not all(part.isdigit() and int(part) for part in parts):
        raise UsageError("--shape", f"found {shape!r}", "Write the shape of one sample, for example 3x224x224.")
    return [int(part) for part in parts]


def _stored_inputs(stored: Any, batch: int) -> Any:
    """Random values for the one floating tensor that a record remembers; None if it is not that simple."""
    try:
        (tensor,), kwargs = stored
        if kwargs or not tensor.is_floating_point():
            return None
        return torch.randn(affordable("the stored inputs", batch, *tensor.shape[1:]), dtype=tensor.dtype)
    except (TypeError, ValueError, AttributeError, CaptureError):
        return None


def data_for(
    model: nn.Module,
    source: str,
    *,
    batch: int,
    seed: int = 0,
    size: int | None = None,
    limit: int | None = None,
) -> DataSource:
    """A data source in the form that a model takes.

    Raises:
        LinearizeError: no such data, or the model takes no images.
    """
    form = image_format(model)
    return load_data(
        source,
        size=size or form.size,
        in_chans=form.channels,
        mean=form.mean,
        std=form.std,
        batch_size=batch,
        seed=seed,
        limit=limit,
        keywords=form.keywords,
    )


def parse_dtype(name: str | None) -> torch.dtype | None:
    """A floating type by its name.

    Raises:
        UsageError: there is no such type.

    Examples:
        >>> parse_dtype("bfloat16")
        torch.bfloat16
    """
    known = {
        "float32": torch.float32,
        "float64": torch.float64,
        "bfloat16": torch.bfloat16,
        "float16": torch.float16,
    }
    if name is None:
        return None
    if name not in known:
        raise UsageError("--dtype", f"found {name!r}", f"Known are {', '.join(known)}.")
    return known[name]


def open_pair(
    a: str, b: str, arguments: list[str] | None, *, pretrained: bool | None, seed: int
) -> tuple[nn.Module, nn.Module]:
    """Open two models. The arguments are for those that are not files.

    Raises:
        LinearizeError: there is no such model.
    """
    if arguments and all(spec.endswith(".safetensors") for spec in (a, b)):
        open_model(a, arguments)
    models = [
        open_model(
            spec,
            None if spec.endswith(".safetensors") else arguments,
            pretrained=None if spec.endswith(".safetensors") else pretrained,
            seed=seed,
        )
        for spec in (a, b)
    ]
    return models[0], models[1]


def test_inputs(source: DataSource) -> list[Any]:
    """All test images without labels, in the form that `verify` takes."""
    names = source.test.keywords
    return [batch[0] if names is None else {names[0]: batch[names[0]]} for batch in source.test]
