"""Build from a stranger's recipe with nothing else allowed: no network, no programs, no questions, no other files.

The content of a recipe is checked first (`transformers_recipe`, `timm_models`). This is the second protection: while a
model is built from a recipe, an audit hook of Python refuses everything in this thread that reaches outside the
installed libraries.
"""

from __future__ import annotations

import functools
import os
import sys
import sysconfig
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from linearize.errors import UsageError

__all__ = ["Outside", "sealed"]

_REFUSED = {
    "builtins.input", "os.exec", "os.fork", "os.forkpty", "os.posix_spawn", "os.spawn", "os.startfile", "os.system",
    "pickle.find_class", "pty.spawn", "subprocess.Popen", "webbrowser.open", "urllib.Request", "sqlite3.connect",
    "_thread.start_new_thread",
}  # fmt: skip
_CHANGES = {
    "os.chmod", "os.chown", "os.link", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.symlink", "os.truncate",
    "shutil.move", "shutil.rmtree", "shutil.copyfile", "shutil.unpack_archive", "tempfile.mkstemp", "tempfile.mkdtemp",
}  # fmt: skip
_WATCHED = _REFUSED | _CHANGES | {"open", "ctypes.dlopen"}
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
# Facts about the machine that libraries ask for when they are imported.
_MACHINE = ("/proc/cpuinfo", "/proc/meminfo", "/proc/self/status", "/sys/devices/system/", "/dev/null", "/dev/urandom")
_CACHED = os.sep + "__pycache__"


class Outside(PermissionError):
    """The error for anything that tries to reach outside while a model is built from a recipe."""


class _State(threading.local):
    depth = 0
    asked = ""


_state = _State()


@contextmanager
def sealed() -> Iterator[None]:
    """Inside this context, this thread reaches nothing but the installed libraries.

    Raises:
        UsageError: something inside tried to, and failed for it.
    """
    _install()
    _state.depth += 1
    try:
        yield
    except Exception as error:
        if not _state.asked:
            raise
        found, remedy = f"it reaches outside the libraries: {_state.asked}", "Check where it came from."
        raise UsageError("recipe", found, remedy) from error
    finally:
        _state.depth -= 1
        if not _state.depth:
            _state.asked = ""


@functools.cache
def _install() -> None:
    """Audit hooks cannot be removed: one is put in at the first use, and does nothing outside `sealed`."""
    sys.addaudithook(_watch)


def _watch(event: str, args: tuple[Any, ...]) -> None:
    if event not in _WATCHED and not event.startswith("socket."):
        return
    if not _state.depth or (event == "open" and _may_open(*args)):
        return
    if event in _CHANGES and any(isinstance(arg, str) and _CACHED in arg for arg in args):
        return  # Python's own cache of compiled libraries
    if event == "ctypes.dlopen" and (not args[0] or os.sep not in str(args[0]) or _is_library(args[0])):
        return
    _state.asked = _state.asked or f"{event} {str(args[0] if args else '')!r:.80}"
    raise Outside(1, "not while a model is built from a file", str(args[0]) if args else "")


def _may_open(path: Any, _mode: Any = None, flags: Any = 0) -> bool:
    if not isinstance(path, (str, bytes, os.PathLike)):
        return True  # a descriptor that is open already
    name = os.path.abspath(os.fsdecode(path))  # noqa: PTH100 - the fastest, and the hook runs for every import
    if isinstance(flags, int) and flags & _WRITES:
        return _CACHED in name and _is_library(name)
    return name.startswith(_MACHINE) or _is_library(name)


def _is_library(path: Any) -> bool:
    return os.path.realpath(os.fsdecode(path)).startswith(_libraries())


@functools.cache
def _libraries() -> tuple[str, ...]:
    """Folders of the standard library, of installed packages, and of those that are installed elsewhere."""
    known = {sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    known |= {str(Path(entry)) for entry in sys.path if entry.endswith(("site-packages", "dist-packages"))}
    archives = tuple(os.path.realpath(entry) for entry in sys.path if entry.endswith(".zip"))
    for name in ("linearize", "torch", "numpy", "timm", "transformers", "safetensors", "huggingface_hub"):
        module = sys.modules.get(name)
        if module is not None and getattr(module, "__file__", None):
            known.add(str(Path(str(module.__file__)).parent))
    return (*archives, *(os.path.realpath(folder) + os.sep for folder in known if folder))
