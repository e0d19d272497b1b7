"""Traps for whatever a file must not lead to: code, the network, questions, files and programs outside the libraries.

An audit hook of Python cannot be removed and sees nearly everything; `torch.load` and `input` are replaced besides.
"""

from __future__ import annotations

import builtins
import os
import sys
import sysconfig
from pathlib import Path
from typing import Any

import torch

__all__ = ["Watch"]

_CODE = {"os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "subprocess.Popen", "pickle.find_class"}
_MACHINE = ("/proc/", "/sys/", "/dev/null", "/dev/urandom", "/etc/localtime", "/usr/share/zoneinfo")


class Watch:
    """Counts what happens between `start` and `stop`.

    Args:
        *allowed: what paths may begin with that are opened besides the installed libraries.
        folder: a folder that may be opened itself, to flush its list of names.
    """

    def __init__(self, *allowed: str, folder: str = "") -> None:
        self.folder = os.path.realpath(folder)
        paths = {sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")}
        # The source of a model that is given is read where its forward is rewritten.
        here = Path(__file__).resolve()
        own = (str(here.parents[2] / "linearize"), str(here.with_name("file_cases.py")))
        archives = [entry for entry in sys.path if entry.endswith(".zip")]  # of the standard library
        # Of a package that is installed from its source: a name that stands in sys.path, where metadata is looked for.
        finders = [entry for entry in sys.path if entry.startswith("__editable__.")]
        self.allowed = tuple(os.path.realpath(path) for path in (*paths, *archives, *finders, *allowed, *own))
        self.active = False
        self.seen: dict[str, list[str]] = {}
        self.modules: set[str] = set()
        sys.addaudithook(self._hook)
        self._replace()

    def start(self) -> None:
        """Watch from now on."""
        self.seen, self.modules, self.active = {}, set(sys.modules), True

    def stop(self) -> dict[str, list[str]]:
        """What was seen, by kind: code, network, prompts, reads."""
        self.active = False
        for name in sys.modules.keys() - self.modules:
            file = getattr(sys.modules.get(name), "__file__", None)
            if isinstance(file, str) and not self._inside(file):
                self._note("code", f"import {name}")
        return self.seen

    def _note(self, kind: str, what: str) -> None:
        self.seen.setdefault(kind, []).append(what[:200])

    def _hook(self, event: str, args: tuple[Any, ...]) -> None:
        if not self.active:
            return
        if event == "open":
            if isinstance(args[0], (str, bytes, os.PathLike)) and not self._inside(os.fsdecode(args[0])):
                self._note("reads", os.fsdecode(args[0]))
        elif event in _CODE:
            self._note("code", f"{event} {args!r}")
        elif event.startswith("socket.") or event == "urllib.Request":
            self._note("network", f"{event} {args!r}")
        elif event == "builtins.input":
            self._note("prompts", repr(args))

    def _inside(self, path: str) -> bool:
        name = os.path.realpath(path)
        return name == self.folder or name.startswith(_MACHINE) or name.startswith(self.allowed)

    def _replace(self) -> None:
        def asked(*args: Any, **_: Any) -> str:
            if self.active:
                self._note("prompts", repr(args))
            return "y"

        def unpickled(*args: Any, **_: Any) -> Any:
            self._note("code", f"torch.load {args!r}")
            raise ValueError("torch.load was called")

        builtins.input = asked
        torch.load = unpickled
