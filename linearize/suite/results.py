"""Results as JSON lines, one for each cell, in a folder that belongs to one suite, its models and one device."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from linearize.errors import CheckpointError, UsageError
from linearize.schema import parse
from linearize.storage.atomic import sync_folder
from linearize.storage.folders import write_text
from linearize.suite.matrix import Cell
from linearize.suite.schema import FORMAT, RECORD, RECORD_IDENTITY

__all__ = ["append", "begin", "identity_of", "records_of"]

_IDENTITY, _LINES = "suite.json", "results.jsonl"
_ANEW = "Measure anew, into another folder."


def begin(folder: Path, identity: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Open a folder for results, empty or of a run that was interrupted; the results that are there already.

    A line that was not written to its end is removed.

    Raises:
        UsageError: the folder belongs to another suite, other models or another device, or to something else.
    """
    there = folder.is_dir() and any(not path.name.startswith(".") for path in folder.iterdir())
    if not there:
        try:
            write_text(folder / _IDENTITY, json.dumps(identity, indent=1) + "\n")
        except CheckpointError as error:
            raise UsageError("--out", f"{folder} {error.found}", error.remedy) from error
        return []
    if not (folder / _IDENTITY).exists():
        raise UsageError("--out", f"found {folder}, which no suite has made", "Pass a new folder.")
    known = identity_of(folder)
    if known != identity:
        found = f"{folder} belongs to another suite: {_difference(known, dict(identity))}"
        raise UsageError("--out", found, "Pass another folder, or the suite and the models it was begun with.")
    _mend(folder / _LINES)
    return records_of(folder)


def append(folder: Path, record: Mapping[str, Any]) -> None:
    """Add a line, and see it onto the disk.

    Raises:
        UsageError: it cannot be written.
    """
    line = json.dumps(record, allow_nan=False) + "\n"
    try:
        with (folder / _LINES).open("ab") as file:
            file.write(line.encode())
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        remedy = "Free some space, and give the same command again: what is measured is kept."
        raise UsageError(str(folder / _LINES), f"cannot be written ({error.strerror})", remedy) from error
    sync_folder(folder)


def identity_of(folder: Path) -> dict[str, Any]:
    """What a folder of results belongs to.

    Raises:
        UsageError: it is no such folder.
    """
    path = folder / _IDENTITY
    try:
        found: dict[str, Any] = parse(path.read_bytes())
    except OSError as error:
        remedy = "Pass folders that linearize bench --suite has written."
        raise UsageError(str(folder), "holds no results of a suite", remedy) from error
    except ValueError as error:
        raise UsageError(str(path), "is damaged", _ANEW) from error
    version = found.get("format") if isinstance(found, dict) else None
    if type(version) is int and version > FORMAT:
        raise UsageError(str(path), f"has the format {version}, not {FORMAT}", "Use the version that wrote it.")
    try:
        RECORD_IDENTITY(found, "")
    except ValueError as error:
        raise UsageError(str(path), f"is damaged ({str(error)[:200]})", _ANEW) from error
    return found


def records_of(folder: Path) -> list[dict[str, Any]]:
    """The lines of a folder; of a cell that was measured again, the last one. A line without an end is left out.

    Raises:
        UsageError: another line is damaged.
    """
    path = folder / _LINES
    whole = path.read_bytes() if path.exists() else b""
    found: dict[str, dict[str, Any]] = {}
    for number, line in enumerate(whole.split(b"\n")[:-1], 1):
        try:
            record = parse(line)
            RECORD(record, "")
        except ValueError as error:
            remedy = "Remove this line; its cell is then measured again."
            raise UsageError(f"{path}, line {number}", f"is damaged ({str(error)[:200]})", remedy) from error
        found[Cell(**record["cell"]).key] = record
    return list(found.values())


def _mend(path: Path) -> None:
    """Cut off a line that was not written to its end."""
    if path.exists():
        whole = path.read_bytes()
        if whole and not whole.endswith(b"\n"):
            with path.open("r+b") as file:
                file.truncate(whole.rfind(b"\n") + 1)
                os.fsync(file.fileno())


def _difference(known: Any, given: Any, where: str = "") -> str:
    """The first difference of two nests, in words."""
    if isinstance(known, dict) and isinstance(given, dict):
        for name in dict.fromkeys([*known, *given]):
            if known.get(name) != given.get(name):
                return _difference(known.get(name), given.get(name), f"{where}.{name}" if where else str(name))
    return f"{where} is {known!r:.80} there and {given!r:.80} here"
