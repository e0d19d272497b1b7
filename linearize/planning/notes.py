"""What an interrupted compression has found out already: statistics of finished passes, in a folder."""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from linearize.errors import CheckpointError
from linearize.nest import plain
from linearize.running.batches import count_of, length_of
from linearize.training.state import read_state, write_state

__all__ = ["NOTHING", "Notes", "facts_of", "fingerprint"]


@dataclass(frozen=True)
class Notes:
    """Results by name, one file each, written whole or not at all; those of another job are not read.

    Attributes:
        folder: where the files are; None remembers nothing.
        key: what tells this job from others, see `fingerprint`.

    Example:
        >>> Notes(None, "").read("anything") is None
        True
    """

    folder: Path | None
    key: str

    def read(self, name: str) -> Any | None:
        """What was noted under a name; None if nothing was, or by another job, or the file is damaged."""
        if self.folder is None:
            return None
        try:
            held = read_state(self._path(name))
        except CheckpointError:
            return None
        return held["noted"] if isinstance(held, dict) and held.get("key") == self.key else None

    def some(self, kind: str, names: Iterable[str]) -> dict[str, Any]:
        """What was noted of a kind, for those names of which anything was."""
        found = {name: self.read(f"{kind} {name}") for name in names}
        return {name: value for name, value in found.items() if value is not None}

    def write(self, kind: str, noted: Mapping[str, Any]) -> None:
        """Note results of a kind, by name.

        Raises:
            CheckpointError: a file cannot be written.
        """
        for name, value in noted.items() if self.folder is not None else ():
            path = self._path(f"{kind} {name}")
            path.parent.mkdir(parents=True, exist_ok=True)
            write_state(path, {"key": self.key, "noted": value})

    def forget(self) -> None:
        """Remove the folder, which is this job's own, and the one around it if nothing else is in it."""
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)
            with suppress(OSError):
                self.folder.parent.rmdir()

    def _path(self, name: str) -> Path:
        """A file name that any system takes, and no other name has."""
        tail = hashlib.sha256(name.encode()).hexdigest()[:12]
        return Path(self.folder or "") / f"{re.sub('[^A-Za-z0-9.]+', '-', name)[:80]}-{tail}.safetensors"


NOTHING = Notes(None, "")


def fingerprint(model: nn.Module, *others: Any) -> str:
    """A text that changes with the weights of a model, or with anything else that results depend on.

    Tensors count by shape, dtype and sum: what is meant to be told apart are jobs, not forgeries.

    Example:
        >>> net = nn.Linear(2, 2)
        >>> fingerprint(net, 0) == fingerprint(net, 0), fingerprint(net, 0) == fingerprint(net, 1)
        (True, False)
    """
    told = hashlib.sha256()
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for leaf in [*tensors, *pytree.tree_leaves((list(tensors.values()), others))]:
        if isinstance(leaf, Tensor):
            value = leaf.detach()
            told.update(f"{tuple(value.shape)} {value.dtype} {value.double().sum().item()!r}".encode())
        else:
            told.update(repr(leaf).encode())
    return told.hexdigest()


def facts_of(data: Iterable[Any]) -> list[Any]:
    """What tells data from other data: numbers of batches and samples, and the first batch.

    Of a batch that is another each time, as one of a shuffled loader is, only shapes and dtypes.

    Example:
        >>> import torch
        >>> facts_of([torch.ones(2, 3)])[:3]
        [1, 1, [((2, 3), 'torch.float32')]]
    """
    first, again = (pytree.tree_leaves(plain(next(iter(data)))) for _ in range(2))
    shapes = [(tuple(x.shape), str(x.dtype)) if isinstance(x, Tensor) else repr(x) for x in first]
    length, samples = count_of(data), length_of(getattr(data, "dataset", None))
    return [
        length,
        length if samples is None else samples,
        shapes,
        first if _same(first, again) else [],
    ]


def _same(some: list[Any], others: list[Any]) -> bool:
    def equal(a: Any, b: Any) -> bool:
        if isinstance(a, Tensor) and isinstance(b, Tensor):
            return torch.equal(a, b)
        return repr(a) == repr(b)

    return len(some) == len(others) and all(map(equal, some, others))
