"""Folders for the state of an interrupted run. They are made before any work, and only our own files are removed."""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from linearize.errors import CheckpointError
from linearize.storage.atomic import write_atomically

__all__ = ["clear", "make_folder", "remove_leftovers", "write_text"]


def make_folder(folder: Path) -> None:
    """Make a folder and its parents, and check that a file can be written there.

    Raises:
        CheckpointError: it cannot be made, or not be written in.
    """
    trial = folder / f".{secrets.token_hex(8)}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        trial.touch(exist_ok=False)
        trial.unlink()
    except OSError as error:
        found = f"no file can be written there: {error.strerror or error}"
        raise CheckpointError(str(folder), found, "Free some space, or pass another folder.") from error


def write_text(path: Path, text: str) -> None:
    """Write a text file completely or not at all: to another name, flushed, then renamed.

    Raises:
        CheckpointError: it cannot be written.
    """
    write_atomically(path, lambda file: file.write(text.encode()))


def remove_leftovers(folder: Path, name: str) -> None:
    """Remove unfinished files that killed processes left, for files whose names match a pattern.

    Nobody else may be writing in the folder: see `storage.lock`.
    """
    wanted = re.compile(rf"\.(?:{name})\.[0-9a-f]+\.tmp|\.linearize-[0-9a-f]+-[0-9]+-[0-9a-f]+\.tmp")
    for path in folder.glob(".*.tmp"):
        if wanted.fullmatch(path.name):
            path.unlink(missing_ok=True)


def clear(folder: Path, names: Iterable[str]) -> None:
    """Remove the files of a folder whose names match one of some patterns, and the folder if it is then empty."""
    wanted = re.compile("|".join(f"(?:{name})" for name in names))
    with suppress(OSError):  # what cannot be removed stays: the work is done
        for path in folder.iterdir():
            if wanted.fullmatch(path.name) and not path.is_dir():
                path.unlink(missing_ok=True)
        for name in names:
            remove_leftovers(folder, name)
        folder.rmdir()
