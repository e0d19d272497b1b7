"""Texts, one after the other: of .txt, .jsonl and .parquet files, of folders of them, and of rows in memory."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from linearize.data.files import SUFFIXES
from linearize.errors import DataError

__all__ = ["Passage", "is_text", "pieces_of"]

_PIECE = 2**20  # characters that a tokenizer is given at a time
_HELD = ("test", "val", "valid", "validation", "eval", "heldout", "held-out")
_FORMS = "Supported are .txt, .jsonl and .parquet files, and folders of them."


@dataclass(frozen=True)
class Passage:
    """A part of a document.

    Attributes:
        text: some of it.
        ends: whether the document ends here.
        held: whether the source keeps it for testing; None: it does not say.
    """

    text: str
    ends: bool = True
    held: bool | None = None


def is_text(data: Any) -> bool:
    """Whether data are texts: a path of such files, a data set with columns, or rows and strings in a list.

    Examples:
        >>> is_text("corpus.jsonl"), is_text(["one text", "another"]), is_text([[1.0]]), is_text("digits")
        (True, True, False, False)
    """
    if isinstance(data, str | os.PathLike):
        path = Path(data)
        return path.suffix.lower() in _READERS or (path.is_dir() and not _has_images(path) and bool(_files(path)))
    if isinstance(data, Mapping):
        return bool(data) and all(is_text(part) for part in data.values())
    if hasattr(data, "column_names"):
        return "input_ids" not in (data.column_names or ())
    if isinstance(data, list | tuple) and data:
        first = data[0]
        return isinstance(first, str) or (
            isinstance(first, Mapping) and any(isinstance(v, str) for v in first.values())
        )
    return False


def pieces_of(data: Any, column: str | None = None) -> Iterator[Passage]:
    """The documents of a source, in pieces, in an order that is always the same.

    Args:
        data: see `is_text`. Files and parts whose name is "test", "val" or "validation" are kept for testing.
        column: of the text; None takes "text", or the only column of strings.

    Raises:
        DataError: a file is missing, empty or damaged, or there is no such column.
    """
    if isinstance(data, str | os.PathLike):
        yield from _of_path(Path(data), column)
    elif isinstance(data, Mapping):
        for name, part in data.items():
            held = str(name).lower() in _HELD
            yield from (Passage(piece.text, piece.ends, held) for piece in pieces_of(part, column))
    else:
        yield from _of_rows(data, column, "data", lambda index: f"row {index}")


def _of_path(path: Path, column: str | None) -> Iterator[Passage]:
    if not path.exists():
        raise DataError(str(path), "does not exist", _FORMS)
    files = _files(path) if path.is_dir() else [path]
    if not files:
        raise DataError(str(path), "holds no text", _FORMS)
    held = [path.is_dir() and _is_held(file, path) for file in files]
    for file, kept in zip(files, held, strict=True):
        read = _READERS.get(file.suffix.lower())
        if read is None:
            raise DataError(str(file), f"found the suffix {file.suffix!r}", _FORMS)
        if not file.stat().st_size:
            raise DataError(str(file), "is empty", "Remove it, or pass other files.")
        try:
            for piece in read(file, column):
                yield Passage(piece.text, piece.ends, kept if any(held) else None)
        except UnicodeDecodeError as error:
            found = f"is not UTF-8 (byte {error.object[error.start] if error.object else 0:#04x})"
            raise DataError(str(file), found, "Write it anew in UTF-8.") from error
        except OSError as error:
            raise DataError(str(file), f"cannot be read ({error.strerror or error})", "Check the file.") from error


def _files(folder: Path) -> list[Path]:
    """All texts in a folder and below, by name; hidden ones are left out."""
    found = (file for file in folder.rglob("*") if file.suffix.lower() in _READERS and file.is_file())
    return sorted(file for file in found if not any(p.startswith(".") for p in file.relative_to(folder).parts))


def _has_images(folder: Path) -> bool:
    """Whether a folder is one of images, beside which there may be a text about them."""
    return any(file.suffix.lower() in SUFFIXES for file in folder.rglob("*"))


def _is_held(file: Path, folder: Path) -> bool:
    names = [*file.relative_to(folder).parts[:-1], file.stem]
    return any(name.lower() in _HELD for name in names)


def _lines(file: Path, _: str | None) -> Iterator[Passage]:
    """A .txt file is one document. It is given in pieces that end with a line."""
    with file.open(encoding="utf-8-sig") as stream:
        text = stream.read(_PIECE) + stream.readline()
        while text:
            more = stream.read(_PIECE)
            more += stream.readline() if more else ""
            yield Passage(text, ends=not more)
            text = more


def _json_lines(file: Path, column: str | None) -> Iterator[Passage]:
    numbers: list[int] = []

    def rows() -> Iterator[Any]:
        with file.open(encoding="utf-8-sig") as stream:
            for number, line in enumerate(stream, 1):
                if not line.strip():
                    continue
                numbers[:] = [number]
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise DataError(f"{file}, line {number}", f"is no JSON ({error!s:.100})", _FORMS) from error
                yield row

    return _of_rows(rows(), column, str(file), lambda _: f"line {numbers[0]}")


def _parquet(file: Path, column: str | None) -> Iterator[Passage]:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise DataError(
            str(file), "pyarrow, which reads it, is not installed", 'pip install "linearize[text]"'
        ) from error
    try:
        with ParquetFile(file) as stored:
            kinds = {field.name: str(field.type) in {"string", "large_string"} for field in stored.schema_arrow}
            name = _column({key: "" if is_string else 0 for key, is_string in kinds.items()}, column, str(file))
            batches = stored.iter_batches(columns=[name])
            rows = (row for batch in batches for row in batch.to_pylist())
            yield from _of_rows(rows, name, str(file), lambda index: f"row {index}")
    except (ArrowException, OSError) as error:
        raise DataError(str(file), f"is no parquet file that can be read ({error!s:.120})", "Write it anew.") from error


_READERS: dict[str, Callable[[Path, str | None], Iterator[Passage]]] = {
    ".txt": _lines,
    ".jsonl": _json_lines,
    ".parquet": _parquet,
}


def _of_rows(rows: Iterable[Any], column: str | None, where: str, place: Callable[[int], str]) -> Iterator[Passage]:
    """Rows: texts, or a mapping each, of which one column is the text."""
    name = column
    for index, row in enumerate(rows):
        if isinstance(row, Mapping):
            name = _column(row, name, f"{where}, {place(index)}")
            value = row[name]
        else:
            value = row
        if not isinstance(value, str):
            found = f"found {type(value).__name__} where a text was expected"
            raise DataError(f"{where}, {place(index)}", found, "Leave such rows out, or pass column=.")
        if value:
            yield Passage(value)


def _column(row: Mapping[str, Any], column: str | None, where: str) -> str:
    """The name of the column of text."""
    if column is not None:
        if column not in row:
            found = f"found no column {column!r}"
            raise DataError(
                where, found, f"Pass one of {', '.join(map(str, row)) or 'those that there are'} as column=."
            )
        return column
    texts = [name for name, value in row.items() if isinstance(value, str)]
    if "text" in texts or len(texts) == 1:
        return "text" if "text" in texts else texts[0]
    found = f"found {_listed(texts)} of text" if texts else f"found no column of text among {', '.join(map(str, row))}"
    raise DataError(where, found, "Pass column= with the name of the one to use.")


def _listed(names: Sequence[str]) -> str:
    return f"the columns {', '.join(names)}"
