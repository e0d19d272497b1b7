"""Text as data of a command."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import typer
from torch import nn

from linearize.cli import common
from linearize.data import DataSource, TextSource, load_text
from linearize.data.text_quality import quality_of
from linearize.errors import DataError, UsageError

__all__ = ["ColumnOption", "ContextOption", "TokenizerOption", "evaluation_of", "pair_of", "text_for"]

TokenizerOption = Annotated[
    str | None,
    typer.Option(
        metavar="PATH", help="Of text: a folder or file with a tokenizer. Default: the one in the model's folder."
    ),
]
ContextOption = Annotated[
    int | None, typer.Option(min=2, help="Of text: tokens in a block. Default: 512, or fewer if the model takes fewer.")
]
ColumnOption = Annotated[str | None, typer.Option(help="Of text: the column that holds it. Default: text.")]


def text_for(
    model: nn.Module,
    spec: str,
    source: str,
    reading: Mapping[str, Any],
    *,
    batch: int | None,
    seed: int = 0,
    size: int | None = None,
    limit: int | None = None,
) -> TextSource:
    """Text in the form that a model takes, by the tokenizer that was named, or the one where the model comes from.

    Raises:
        LinearizeError: no such text or tokenizer, or they do not fit the model.
    """
    if size is not None:
        raise UsageError("--size", "found with text", "Pass --context for the number of tokens in a block.")
    options = dict(reading)
    if options["tokenizer"] is None and spec.startswith("hf:"):
        options["tokenizer"] = spec.removeprefix("hf:")
    more: dict[str, Any] = {} if batch is None else {"batch_size": batch}
    try:
        with common.named_as_typed():
            return load_text(source, model, limit=limit, seed=seed, **options, **more)
    except DataError as error:
        where = f"--{error.where}" if error.where == "tokenizer" else error.where
        remedy = error.remedy.replace("tokenizer=", "--tokenizer").replace("column=", "--column")
        raise DataError(where, error.found, remedy) from error


def pair_of(text: str | None) -> tuple[int, ...] | None:
    """Two numbers with a comma between them.

    Raises:
        UsageError: the text is something else.

    Examples:
        >>> pair_of("8,1024")
        (8, 1024)
    """
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",")]
    if len(parts) != 2 or not all(part.isdigit() and int(part) for part in parts):
        raise UsageError("--serving", f"found {text!r}", "Write a batch size and a context, for example 8,1024.")
    return int(parts[0]), int(parts[1])


def evaluation_of(network: nn.Module, source: DataSource | TextSource) -> Any:
    """What is evaluated before and after: test images, or held-back text."""
    return source.test if isinstance(source, DataSource) else quality_of(network, source)
