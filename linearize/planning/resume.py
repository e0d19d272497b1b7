"""What an interrupted compression has found so far, in a folder: statistics of finished passes, and the plan."""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from linearize.errors import CheckpointError
from linearize.nest import plain_nest
from linearize.planning.decision import DECISION_FILE, Decision
from linearize.running.batches import count_of, length_of
from linearize.storage.digest import take_in
from linearize.storage.folders import clear
from linearize.training.state import EPOCH_FILE, read_state, write_state

__all__ = ["NOTHING", "ResumeStore", "facts_of", "fingerprint"]

_log = logging.getLogger(__name__)

_STATISTICS = r"[A-Za-z0-9.-]+-[0-9a-f]{12}\.safetensors"
_OF_A_REQUEST = ("training-*/epoch-*.safetensors", f"planned-*/{DECISION_FILE}")


@dataclass(frozen=True)
class ResumeStore:
    """Results by name, one file each, written completely or not at all. Those of another job are not read.

    A file that is damaged is told of in the log and left out: what it held is found out again.

    Attributes:
        folder: where the statistics are, which any request to this model on this data can use; None remembers nothing.
        key: what tells model and data from others, see `fingerprint`.
        request: what tells the request from others: its plan and its training are for no other.
        beside: the folder of the training, if the user named one: then the plan is noted there.

    Examples:
        >>> ResumeStore(None, "").read("site anything") is None
        True
    """

    folder: Path | None
    key: str
    request: str = ""
    beside: Path | None = None

    def read(self, name: str) -> Any | None:
        """The result under a name; None if there is none, or it is of another job, or the file is damaged."""
        if self.folder is None or not self._path(name).exists():
            return None
        path = self._path(name)
        try:
            held = read_state(path)
        except CheckpointError as error:
            _leave_out(path, error.found)
            return None
        if not isinstance(held, dict) or not {"key", "noted", "digest"} <= held.keys():
            _leave_out(path, "it holds no statistics")
            return None
        if held["key"] != self.key:
            return None
        if held["digest"] != self._digest(name, held["noted"]):
            _leave_out(path, f"it does not hold what was found for {name!r}")
            return None
        return held["noted"]

    def some(self, kind: str, names: Iterable[str]) -> dict[str, Any]:
        """The stored results of a kind, by name."""
        found = {name: self.read(f"{kind} {name}") for name in names}
        return {name: value for name, value in found.items() if value is not None}

    def write(self, kind: str, noted: Mapping[str, Any]) -> None:
        """Store results of a kind, by name.

        Raises:
            CheckpointError: a file cannot be written.
        """
        for name, value in noted.items() if self.folder is not None else ():
            path = self._path(f"{kind} {name}")
            path.parent.mkdir(parents=True, exist_ok=True)
            write_state(path, {"key": self.key, "noted": value, "digest": self._digest(f"{kind} {name}", value)})

    def decision(self, model: nn.Module) -> Decision | None:
        """The stored decision for this request and this gated model; None if there is none."""
        path = self._decision_file
        if path is None:
            return None
        try:
            found = Decision.read(path, self.request)
            return None if found is None else found.checked(model)
        except CheckpointError as error:
            _leave_out(path, error.found)
            return None

    def decide(self, decision: Decision) -> None:
        """Store the decision for this request.

        Raises:
            CheckpointError: it cannot be written.
        """
        if self._decision_file is not None:
            self._decision_file.parent.mkdir(parents=True, exist_ok=True)
            decision.write(self._decision_file, self.request)

    def training(self, plan: str) -> dict[str, Any]:
        """Options of a training that leads to a plan, told as text: where its checkpoints are, and no others."""
        if self.folder is None or self.beside is not None:
            return {}
        name = f"training-{self.request[:12]}-{hashlib.sha256(plan.encode()).hexdigest()[:12]}"
        return {"checkpoint_dir": self.folder / name, "resume": True}

    def forget(self) -> None:
        """Remove the files of this request, and the statistics if no other request is unfinished.

        Only files of ours go, and folders in which nothing else is.
        """
        if self.folder is None:
            return
        clear(self.folder / f"planned-{self.request[:12]}", [re.escape(DECISION_FILE)])
        for place in self.folder.glob(f"training-{self.request[:12]}-*"):
            clear(place, [EPOCH_FILE])
        if any(path for pattern in _OF_A_REQUEST for path in self.folder.glob(pattern)):
            return
        clear(self.folder, [_STATISTICS])
        with suppress(OSError):
            self.folder.parent.rmdir()

    def _digest(self, name: str, noted: Any) -> str:
        """A text that changes with statistics, with their place in the model, and with model and data."""
        told = hashlib.sha256(f"{self.key} {name}".encode())
        _take_in_all(told, noted)
        return told.hexdigest()

    @property
    def _decision_file(self) -> Path | None:
        place = None if self.folder is None else self.folder / f"planned-{self.request[:12]}"
        place = place if self.beside is None else self.beside
        return None if place is None else place / DECISION_FILE

    def _path(self, name: str) -> Path:
        """A file name that any system takes, and no other name has."""
        tail = hashlib.sha256(name.encode()).hexdigest()[:12]
        return Path(self.folder or "") / f"{re.sub('[^A-Za-z0-9.]+', '-', name)[:80]}-{tail}.safetensors"


def _leave_out(path: Path, why: str) -> None:
    _log.warning("%s is damaged and left out: %s", path, why)


NOTHING = ResumeStore(None, "")


def fingerprint(model: nn.Module, *others: Any) -> str:
    """A text that changes with the weights of a model, or with anything else that results depend on.

    Tensors count by every bit. An object counts by its name, or that of its class, never by its address, so that the
    text is the same in another process.

    Examples:
        >>> net = nn.Linear(2, 2)
        >>> fingerprint(net, 0) == fingerprint(net, 0), fingerprint(net, 0) == fingerprint(net, 1)
        (True, False)
        >>> fingerprint(net, lambda x: x + 1) == fingerprint(net, lambda x: x + 2)
        False
    """
    told = hashlib.sha256()
    _take_in_all(told, (_state(model), others))
    return told.hexdigest()


def _state(model: nn.Module) -> list[Any]:
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return [list(tensors), list(tensors.values())]


def _take_in_all(told: Any, nest: Any) -> None:
    """Add a nest of values to a hash: tensors by every bit, objects by their names, functions by what they do."""
    leaves, form = pytree.tree_flatten(nest)
    for leaf in [*leaves, str(form)]:
        if isinstance(leaf, Tensor):
            take_in(told, leaf)
        else:
            text = repr(leaf)
            named = callable(leaf) or " at 0x" in text
            told.update((getattr(leaf, "__qualname__", type(leaf).__name__) if named else text).encode())
            told.update(_code_of(leaf))
        told.update(b"\0")


def _code_of(value: Any) -> bytes:
    """What a function does, as bytes: two lambdas have one name. Nothing for what is no function of Python's."""
    code = getattr(value, "__code__", None)
    if not isinstance(code, CodeType):
        return b""
    # The order of a set is another one in another process.
    constants = [sorted(map(repr, each)) if isinstance(each, frozenset) else each for each in code.co_consts]
    plain = [repr(each) for each in constants if not isinstance(each, CodeType)]
    inner = b"".join(each.co_code for each in code.co_consts if isinstance(each, CodeType))
    return code.co_code + inner + repr((plain, code.co_names)).encode()


def facts_of(data: Iterable[Any]) -> list[Any]:
    """What identifies data: the numbers of batches and samples, and the first batch.

    Of a batch that is another each time, as one of a shuffled loader is, only shapes and dtypes.

    Examples:
        >>> import torch
        >>> facts_of([torch.ones(2, 3)])[:3]
        [1, 1, [((2, 3), 'torch.float32')]]
    """
    first, again = (pytree.tree_leaves(plain_nest(next(iter(data)))) for _ in range(2))
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
