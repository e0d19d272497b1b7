"""The state of a training run in one .safetensors file: tensors as tensors, all else as JSON, no pickle.

A nest of dicts, lists, tuples, numbers, texts and tensors is written as a skeleton in JSON, whose leaves name the
tensors. Random states are part of it, so that a resumed run draws the numbers the whole run would have drawn.
"""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from linearize.errors import CheckpointError
from linearize.storage import tensorfile

__all__ = [
    "checkpoint_path",
    "checkpoints",
    "random_state",
    "read_state",
    "set_random_state",
    "write_state",
]

_FORMAT = "linearize-training"
_VERSION = 1
_NAME = re.compile(r"epoch-(\d+)\.safetensors")


def checkpoint_path(folder: Path, epoch: int) -> Path:
    """Where the state after `epoch` epochs is kept."""
    return folder / f"epoch-{epoch:04d}.safetensors"


def checkpoints(folder: Path) -> list[Path]:
    """All checkpoints of a folder, the oldest epoch first; a folder that does not exist has none."""
    found = {}
    for path in folder.glob("epoch-*.safetensors"):
        if match := _NAME.fullmatch(path.name):
            found[int(match[1])] = path
    return [found[epoch] for epoch in sorted(found)]


def write_state(path: Path, state: Any) -> None:
    """Write a nest of plain values and tensors; the file is complete or not there (see `tensorfile.write`).

    Raises:
        CheckpointError: the file cannot be written.
        TypeError: the nest holds something that is neither plain nor a tensor.
    """
    tensors: dict[str, Tensor] = {}
    skeleton = _take_apart(state, tensors, {})
    metadata = {"format": _FORMAT, "version": str(_VERSION), "state": json.dumps(skeleton)}
    tensorfile.write(path, tensors, metadata)


def read_state(path: Path) -> Any:
    """What `write_state` wrote, with its tensors on the CPU.

    Raises:
        CheckpointError: there is no such file, it is truncated, not a training state, or of a newer version.
    """
    metadata = tensorfile.read_header(path).metadata
    if metadata.get("format") != _FORMAT:
        raise CheckpointError(str(path), "found no training state in it", "Pass a checkpoint of finetune.")
    if metadata.get("version") != str(_VERSION):
        found = f"found version {metadata.get('version')!r:.20} of the format, not {_VERSION}"
        raise CheckpointError(str(path), found, "Resume with the linearize that wrote it.")
    tensors = tensorfile.read_tensors(path, "cpu")
    try:
        return _put_together(json.loads(metadata["state"]), tensors)
    except (KeyError, ValueError, TypeError, IndexError, RecursionError) as error:
        raise CheckpointError(str(path), "its description is damaged", "Resume from another.") from error


def random_state() -> dict[str, Any]:
    """State of every global random generator: Python's, NumPy's, and PyTorch's on each device."""
    name, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)  # noqa: NPY002 - the global one
    return {
        "python": random.getstate(),
        "numpy": [str(name), np.asarray(keys).tolist(), int(position), int(has_gauss), float(gauss)],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Put back what `random_state` took."""
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))  # noqa: NPY002 - the global one
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])


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
