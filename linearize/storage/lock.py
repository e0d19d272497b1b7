"""Lock a folder for one process at a time. The system releases the lock when the process ends, even if it is killed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from linearize.errors import UsageError

__all__ = ["alone_in"]


@contextmanager
def alone_in(folder: Path, where: str) -> Iterator[None]:
    """Inside this context, no other process is in this context for the same folder, which must exist.

    The lock is on the folder itself and leaves no file behind. A system or a file system without such locks is taken
    at its word that nobody else is there.

    Args:
        folder: the folder.
        where: the argument that named it, for the message.

    Raises:
        UsageError: another process is in there.

    Examples:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as name, alone_in(Path(name), "checkpoint_dir"):
        ...     pass
    """
    handle = _opened(folder)
    try:
        if handle is not None and not _locked(handle):
            found = f"found another process at work in {folder}"
            raise UsageError(where, found, "Wait until it has ended, or pass another folder.")
        yield
    finally:
        if handle is not None:
            os.close(handle)


def _opened(folder: Path) -> int | None:
    try:
        return os.open(folder, os.O_RDONLY)
    except OSError:  # not on every system can a folder be opened
        return None


def _locked(handle: int) -> bool:
    """Whether the lock is ours now; also true where there are no locks."""
    try:
        import fcntl
    except ImportError:
        return True
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a network file system without locks
        return True
    return True
