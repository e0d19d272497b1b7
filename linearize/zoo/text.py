"""What is known of a model that reads text: its vocabulary, the longest context, and where its tokenizer is."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

from torch import nn

from linearize.errors import DataError
from linearize.zoo.inputs import unwrap

__all__ = ["is_encoder_decoder", "longest_context", "open_tokenizer", "takes_ids", "tokenizer_of", "vocabulary"]

_REMEDY = "Pass tokenizer=: a folder with a tokenizer, a tokenizer.json, or a tokenizer that is loaded."


def takes_ids(model: nn.Module) -> bool:
    """Whether forward has an argument named `input_ids`.

    Examples:
        >>> takes_ids(nn.Linear(2, 2))
        False
    """
    return "input_ids" in inspect.signature(unwrap(model).forward).parameters


def is_encoder_decoder(model: nn.Module) -> bool:
    """Whether a model has an encoder, and a decoder with an input of its own."""
    return bool(getattr(getattr(unwrap(model), "config", None), "is_encoder_decoder", False))


def longest_context(model: nn.Module) -> int | None:
    """The number of tokens that a model was made for; None if its configuration does not tell."""
    value = getattr(_text_config(model), "max_position_embeddings", None)
    return value if isinstance(value, int) and value > 0 else None


def vocabulary(model: nn.Module) -> int | None:
    """The number of tokens that a model knows; None if it does not tell."""
    find = getattr(unwrap(model), "get_input_embeddings", None)
    try:
        table = find() if callable(find) else None
    except (NotImplementedError, AttributeError):
        table = None
    size = getattr(table, "num_embeddings", None)
    size = getattr(_text_config(model), "vocab_size", None) if size is None else size
    return size if isinstance(size, int) and size > 0 else None


def _text_config(model: nn.Module) -> Any:
    config = getattr(unwrap(model), "config", None)
    inner = getattr(config, "get_text_config", None)
    return inner() if callable(inner) else config


def tokenizer_of(model: nn.Module) -> Any:
    """The tokenizer in the folder that a model was loaded from.

    Raises:
        DataError: the model names no folder, or there is no tokenizer in it.
    """
    name = getattr(unwrap(model), "name_or_path", None)
    if not isinstance(name, str) or not name:
        raise DataError("tokenizer", "is missing, and the model names no folder that it was loaded from", _REMEDY)
    return open_tokenizer(name)


def open_tokenizer(name: str | Path) -> Any:
    """A tokenizer: of a tokenizer.json, of a folder, or of a name on the model hub.

    Raises:
        DataError: there is none, or a library that it needs is not installed.
    """
    place = Path(name).expanduser()
    file = place / "tokenizer.json" if place.is_dir() and not (place / "tokenizer_config.json").is_file() else place
    if file.is_file():
        return _from_file(file)
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise DataError(
            "tokenizer", "transformers is not installed", 'pip install "linearize[transformers]"'
        ) from error
    try:
        return AutoTokenizer.from_pretrained(str(place) if place.is_dir() else str(name), trust_remote_code=False)
    except Exception as error:  # missing files, no network, files of another kind: one clear line each
        line = next((text for text in str(error).strip().splitlines() if text), type(error).__name__)
        raise DataError("tokenizer", f"found none in {str(name)!r} ({line:.160})", _REMEDY) from error


def _from_file(file: Path) -> Any:
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise DataError("tokenizer", "tokenizers is not installed", 'pip install "linearize[text]"') from error
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises plain exceptions
        raise DataError("tokenizer", f"{file} is no tokenizer ({error!s:.160})", _REMEDY) from error
