"""The model, the data and the folder of a command that compresses."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from linearize.cli import common
from linearize.cli.text import text_for
from linearize.data import DataSource, TextSource
from linearize.data.documents import is_text
from linearize.errors import UsageError
from linearize.running.models import evaluating
from linearize.running.outputs import OutputChoice, OutputMeaning, main_part

__all__ = ["folder_for", "is_random", "opened", "output_parts", "required"]

_IMAGES = 64  # in a batch


def output_parts(texts: list[str] | None) -> dict[str, float | str] | None:
    """Parts of the output, each with a weight, or with its kind."""
    found: dict[str, float | str] = {}
    for text in texts or ():
        name, _, value = text.partition("=")
        try:
            found[name] = float(value or 1)
        except ValueError:
            found[name] = value  # a kind, or nothing that the choice takes
    return found or None


def required(out: Path | None) -> Path:
    """The folder for results.

    Raises:
        UsageError: there is none.
    """
    if out is None:
        raise UsageError("--out", "is missing", "Pass a folder for the results, or --dry-run.")
    return out


def folder_for(out: Path) -> Path:
    """The folder, made before any work is done.

    Raises:
        UsageError: it cannot be made.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        remedy = "Pass a folder that can be written."
        raise UsageError("--out", f"cannot make the folder {str(out)!r} ({error.strerror})", remedy) from error
    return out


def opened(
    spec: str,
    data: str,
    arguments: list[str] | None,
    pretrained: bool | None,
    parts: OutputChoice,
    reading: Mapping[str, Any],
    *,
    seed: int,
    labels: bool,
    **options: Any,
) -> tuple[nn.Module, DataSource | TextSource]:
    """The model and its data; a new timm model gets as many classes as the data has.

    Raises:
        LinearizeError: they do not exist, or do not go together.
    """
    network = common.open_model(spec, arguments, pretrained=pretrained, seed=seed)
    if is_text(data):
        return network, text_for(network, spec, data, {**reading, "labels": labels}, seed=seed, **options)
    for name, value in reading.items():
        if value is not None:
            raise UsageError(f"--{name}", "found with data that are no text", "Leave it out.")
    options["batch"] = options["batch"] or _IMAGES
    source = common.data_for(network, data, seed=seed, **options)
    given = [text.partition("=")[0] for text in arguments or []]
    if spec.startswith("timm:") and "num_classes" not in given:
        more = [*(arguments or []), f"num_classes={source.num_classes}"]
        network = common.open_model(spec, more, pretrained=pretrained, seed=seed)
    _check_classes(network, source, parts)
    return network, source


def _check_classes(network: nn.Module, source: DataSource, parts: OutputChoice) -> None:
    with evaluating(network):
        batch = next(iter(source.test))
        names = source.test.keywords
        output = network(batch[0]) if names is None else network(**{names[0]: batch[names[0]]})
    OutputMeaning.of(network, parts).parts(output)  # raises if there is no such part
    classes = main_part(output).tensor.shape[-1]
    if classes < source.num_classes:
        found = f"found {classes} outputs for {source.num_classes} classes"
        raise UsageError(type(network).__name__, found, f"Try -a num_labels={source.num_classes}, or other data.")


def is_random(spec: str, pretrained: bool | None) -> bool:
    """Whether a model comes with random weights."""
    return (spec.startswith("timm:") and not pretrained) or pretrained is False
