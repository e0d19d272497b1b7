"""Files that are written completely or not at all, and checked when they are read.

A file is written beside its target under another name, flushed to the disk, and renamed. A reader sees either the old
or the new file. What killed runs left behind is removed by the next write into that folder.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import os
import platform
import re
import secrets
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from linearize.errors import CheckpointError

__all__ = [
    "check_readable",
    "checksum",
    "destination",
    "read_checked",
    "read_file",
    "sync_folder",
    "write_atomically",
    "write_checked",
]

_PREFIX = ".linearize-"
_OURS = re.compile(r"\.linearize-([0-9a-f]{8})-(\d{1,10})-[0-9a-f]{8}\.tmp", re.ASCII)
_OLDER = re.compile(r"\..+\.[0-9a-f]{8}\.tmp", re.ASCII)  # the names of version 0.1
_OLD = 24 * 3600.0
_MARK = b"linearize-checked 1 "
_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def checksum(*parts: bytes | memoryview) -> str:
    """SHA-256 of bytes, one part after the other, as text.

    Examples:
        >>> checksum(b"linear", b"ize")[:12]
        '48692aadb1eb'
    """
    told = hashlib.sha256()
    for part in parts:
        told.update(part)
    return told.hexdigest()


def file_checksum(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file's content, as `sha256sum` prints it.

    Raises:
        CheckpointError: there is no such file, or it cannot be read.
    """
    check_readable(path)
    try:
        with Path(path).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(str(path), f"it cannot be read: {error.strerror or error}", "Check the file.") from error


def write_atomically(path: str | os.PathLike[str], fill: Callable[[BinaryIO], object]) -> None:
    """Write a file completely or not at all. A failure leaves the old file.

    The mode of a file that is replaced is kept, and a link stays a link. Threads and processes may write the same
    path at once: the last one to finish stays.

    Args:
        path: where.
        fill: writes the content to the file that it is given.

    Raises:
        CheckpointError: the path is no place for a file, the folder is missing or not writable, or the disk is full.
    """
    target = destination(path)
    try:
        _remove_stale(target)
        beside = target.with_name(f"{_PREFIX}{_host()}-{os.getpid()}-{secrets.token_hex(4)}.tmp")
        try:
            # x: never write into a file that someone else has opened under this name.
            with beside.open("xb") as file:
                with contextlib.suppress(FileNotFoundError):
                    beside.chmod(stat.S_IMODE(target.stat().st_mode))
                fill(file)
                file.flush()
                os.fsync(file.fileno())
            beside.replace(target)
        except BaseException:
            with contextlib.suppress(OSError):
                beside.unlink()
            raise
    except OSError as error:
        found = f"it cannot be written: {error.strerror or error}"
        remedy = "Free some space or choose another folder; a file that was there before is as it was."
        raise CheckpointError(str(path), found, remedy) from error
    sync_folder(target.parent)


def write_checked(path: str | os.PathLike[str], data: bytes) -> None:
    """Write bytes behind their own checksum, atomically; `read_checked` reads them back.

    Raises:
        CheckpointError: as of `write`.
    """

    def fill(file: BinaryIO) -> None:
        file.write(_MARK + checksum(data).encode() + b"\n")
        file.write(data)

    write_atomically(path, fill)


def read_checked(path: str | os.PathLike[str], *, limit: int = 2**30) -> bytes:
    """The bytes that `write_checked` wrote.

    Args:
        path: the file.
        limit: largest number of bytes that is read.

    Raises:
        CheckpointError: there is no such file, it is no file, too long, or its content is not that of its checksum.
    """
    raw = read_file(path, limit=limit)
    first, line, data = raw.partition(b"\n")
    if not line or first != _MARK + checksum(data).encode():
        raise CheckpointError(str(path), "its content is not that of its checksum", "It is damaged: remove it.")
    return data


def read_file(path: str | os.PathLike[str], *, limit: int) -> bytes:
    """All bytes of an ordinary file, if they are no more than a limit.

    Raises:
        CheckpointError: there is no such file, it is no file, too long, or cannot be read.
    """
    size = check_readable(path)
    if size > limit:
        raise CheckpointError(str(path), f"it has {size} bytes, more than the {limit} expected", "Check the file.")
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise CheckpointError(str(path), f"it cannot be read: {error.strerror or error}", "Check the file.") from error


def destination(path: str | os.PathLike[str]) -> Path:
    """The file, behind all links, that a write to ``path`` makes or replaces.

    Raises:
        CheckpointError: a folder, device, pipe or socket is there, or the path can be no file.
    """
    try:
        target = Path(os.path.realpath(path))
        mode = target.stat().st_mode
    except FileNotFoundError:
        return target
    except (OSError, ValueError) as error:
        raise _no_path(path, error) from error
    if not stat.S_ISREG(mode):
        kind = _KINDS.get(stat.S_IFMT(mode), "no ordinary file")
        raise CheckpointError(str(path), f"it is {kind}", "Pass the path of a file, such as model.safetensors.")
    return target


def check_readable(path: str | os.PathLike[str]) -> int:
    """The size of an ordinary file, without opening it: opening a pipe would wait for ever.

    Raises:
        CheckpointError: there is no such file, it is something else than a file, or the path can be none.
    """
    try:
        found = Path(path).stat()
    except FileNotFoundError as error:
        raise CheckpointError(str(path), "there is no such file", "Check the path.") from error
    except (OSError, ValueError) as error:
        raise _no_path(path, error) from error
    if not stat.S_ISREG(found.st_mode):
        kind = _KINDS.get(stat.S_IFMT(found.st_mode), "no ordinary file")
        raise CheckpointError(str(path), f"it is {kind}", "Pass the path of a .safetensors file.")
    return found.st_size


def sync_folder(folder: Path) -> None:
    """Flush a folder's list of names to the disk, where the system allows it. The file itself is already complete."""
    if os.name != "posix":  # other systems do not open folders, and rename safely without
        return
    with contextlib.suppress(OSError):  # a folder may be writable and not readable
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _no_path(path: str | os.PathLike[str], error: OSError | ValueError) -> CheckpointError:
    shown = str(path).replace("\0", "\\0")
    shown = shown if len(shown) <= 200 else f"{shown[:200]}..."
    if isinstance(error, OSError) and error.errno == errno.ENOTDIR:
        return CheckpointError(shown, "a part of the path is a file, not a folder", "Check the path.")
    found = (error.strerror or str(error)) if isinstance(error, OSError) else str(error)
    return CheckpointError(shown, f"it can be no file: {found}", "Check the path.")


@functools.cache
def _host() -> str:
    """What tells process ids of this machine and container from those of another that shares the folder."""
    try:
        space = str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        space = ""
    return checksum(f"{platform.node()} {space}".encode())[:8]


def _remove_stale(target: Path) -> None:
    """Remove what runs that are dead have left beside a target, by our own pattern of names only."""
    try:
        names = os.listdir(target.parent)  # noqa: PTH208 - names are all that is needed
    except OSError:  # a folder may be writable and not readable
        return
    for name in names:
        if not name.endswith(".tmp"):
            continue
        path = target.with_name(name)
        ours = _OURS.fullmatch(name)
        older = name.startswith(f".{target.name}.") and _OLDER.fullmatch(name)
        with contextlib.suppress(OSError):
            if (ours and ours[1] == _host() and not _lives(int(ours[2]))) or (
                older and time.time() - path.stat().st_mtime > _OLD
            ):
                path.unlink()


def _lives(process: int) -> bool:
    if os.name != "posix":  # other systems end the process that is asked in this way
        return True
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        return True
    return True
