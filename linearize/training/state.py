"""Plain state in one .safetensors file: tensors as tensors, everything else as JSON, no pickle, and one checksum.

The state is nested dicts, lists, tuples, numbers, texts and tensors. It is written as JSON whose leaves name the
tensors. The state of a training run is written in this way, and so are the statistics of a pass over the data.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from torch import Tensor

from linearize.errors import CheckpointError
from linearize.storage import tensorfile
from linearize.storage.digest import take_in

__all__ = ["EPOCH_FILE", "Damaged", "checkpoint_path", "checkpoints", "read_state", "write_state"]

EPOCH_FILE = r"epoch-(\d+)\.safetensors"
"""The names of checkpoints, as a pattern."""

Thing = TypeVar("Thing")

_FORMAT = "linearize-training"
_VERSION = 2  # 1 had no checksum
_NAME = re.compile(EPOCH_FILE)


class Damaged(CheckpointError):
    """A file of ours that is not what was written. Its content must be computed again."""


def checkpoint_path(folder: Path, epoch: int) -> Path:
    """The path of the state after `epoch` epochs."""
    return folder / f"epoch-{epoch:04d}.safetensors"


def checkpoints(folder: Path) -> list[Path]:
    """All checkpoints of a folder, the oldest epoch first; a folder that does not exist has none."""
    found = {}
    for path in folder.glob("epoch-*.safetensors"):
        if match := _NAME.fullmatch(path.name):
            found[int(match[1])] = path
    return [found[epoch] for epoch in sorted(found)]


def write_state(path: Path, state: Any) -> None:
    """Write a nest of plain values and tensors; the file is complete or not there (see `tensorfile.write_tensors`).

    Raises:
        CheckpointError: the file cannot be written.
        TypeError: the nest holds something that is neither plain nor a tensor.
    """
    tensors: dict[str, Tensor] = {}
    skeleton = json.dumps(_take_apart(state, tensors, {}))
    metadata = {"format": _FORMAT, "version": str(_VERSION), "state": skeleton, "sha256": _checksum(skeleton, tensors)}
    tensorfile.write_tensors(path, tensors, metadata)


def read_state(path: Path) -> Any:
    """The state that `write_state` wrote, with its tensors in their own memory on the CPU.

    Raises:
        Damaged: it is truncated, no file of ours, or not what was written.
        CheckpointError: there is no such file, or it is of another version.
    """
    metadata = _read(path, tensorfile.read_header).metadata
    if metadata.get("format") != _FORMAT:
        raise Damaged(str(path), "found no training state in it", "Pass a checkpoint of finetune.")
    mapped = _read(path, lambda file: tensorfile.read_tensors(file, "cpu"))
    # In memory of their own: what is mapped changes, or is gone, if another process writes into the file.
    tensors = {name: tensor.clone() for name, tensor in mapped.items()}
    if metadata.get("version") != str(_VERSION):
        _refuse_version(path, metadata, tensors)
    try:
        if metadata["sha256"] != _checksum(metadata["state"], tensors):
            raise Damaged(str(path), "its checksum is not that of its content", "Resume from another.")
        return _put_together(json.loads(metadata["state"]), tensors)
    except (KeyError, ValueError, TypeError, IndexError, RecursionError) as error:
        raise Damaged(str(path), "its description is damaged", "Resume from another.") from error


def _refuse_version(path: Path, metadata: Mapping[str, str], tensors: dict[str, Tensor]) -> NoReturn:
    """Another version; but if the content has our checksum, it is the version that is damaged."""
    found = f"found version {metadata.get('version')!r:.20} of the format, not {_VERSION}"
    with suppress(KeyError, ValueError):
        if metadata["sha256"] == _checksum(metadata["state"], tensors):
            raise Damaged(str(path), found, "Resume from another.")
    raise CheckpointError(str(path), found, "Resume with the linearize that wrote it.")


def _read(path: Path, how: Callable[[Path], Thing]) -> Thing:
    """What a reader makes of a file that is there: what it refuses is damaged."""
    try:
        return how(path)
    except CheckpointError as error:
        if not path.is_file():
            raise
        raise Damaged(error.where, error.found, error.remedy) from error


def _checksum(skeleton: str, tensors: dict[str, Tensor]) -> str:
    told = hashlib.sha256(skeleton.encode())
    for name in sorted(tensors):
        told.update(name.encode())
        take_in(told, tensors[name])
    return told.hexdigest()


def _take_apart(value: Any, tensors: dict[str, Tensor], seen: dict[tuple[Any, ...], str]) -> Any:
    """JSON for a nest: `{"tensor": name}`, `{"dict": [[key, value], ...]}`, `{"tuple": [...]}`, lists, scalars."""
    if isinstance(value, Tensor):
        # A tied weight has two names and one memory: write it once.
        key = (value.data_ptr(), value.shape, value.stride(), value.dtype, value.device)
        name = seen.get(key) if value.numel() else None
        if name is None:
            name = seen[key] = str(len(tensors))
            tensors[name] = value
        return {"tensor": name}
    if isinstance(value, dict):
        return {"dict": [[_take_apart(entry, tensors, seen) for entry in item] for item in value.items()]}
    if isinstance(value, tuple):
        return {"tuple": [_take_apart(entry, tensors, seen) for entry in value]}
    if isinstance(value, list):
        return [_take_apart(entry, tensors, seen) for entry in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"a {type(value).__name__} cannot be part of a training state")


def _put_together(skeleton: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(skeleton, list):
        return [_put_together(entry, tensors) for entry in skeleton]
    if not isinstance(skeleton, dict):
        return skeleton
    ((kind, value),) = skeleton.items()
    if kind == "tensor":
        return tensors[value]
    if kind == "tuple":
        return tuple(_put_together(entry, tensors) for entry in value)
    return {_put_together(key, tensors): _put_together(entry, tensors) for key, entry in value}
