"""A folder of .safetensors files, as transformers writes it: one file, or several with an index. Read tensor by tensor.

Only headers are read at first, so a folder of any size is opened at once. Tensors are mapped: their values are read
when they are used, and given back to the system when nobody holds them any more.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from linearize.errors import CheckpointError
from linearize.storage import atomic, tensorfile

__all__ = ["INDEX", "SINGLE", "Shards", "fill_from", "write_shards"]

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
"""Names of the only file, and of the index of several."""

_LONGEST_INDEX = 2**26


@dataclass(frozen=True)
class Shards:
    """The tensors of a folder.

    Attributes:
        folder: where they are.
        files: by the name of a tensor, the name of its file.
        shapes: by the name of a tensor.
        dtypes: by the name of a tensor.
        told: what identifies the files: names, sizes and times.
    """

    folder: Path
    files: Mapping[str, str]
    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, torch.dtype]
    told: str

    @classmethod
    def open(cls, folder: Path) -> Shards:
        """Read the headers of all files of a folder.

        Raises:
            CheckpointError: there are no weights, a file is missing or damaged, or does not hold what the index says.

        Examples:
            >>> import tempfile
            >>> with tempfile.TemporaryDirectory() as name:
            ...     tensorfile.write_tensors(Path(name) / SINGLE, {"weight": torch.ones(2, 3)}, {})
            ...     found = Shards.open(Path(name))
            ...     found.shapes["weight"], found.tensors(["weight"])["weight"].sum().item()
            ((2, 3), 6.0)
        """
        index = _index(folder)
        names = sorted(set(index.values())) if index else [SINGLE]
        files: dict[str, str] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        dtypes: dict[str, torch.dtype] = {}
        told = []
        for name in names:
            path = folder / name
            if not path.is_file():
                what = f"it is missing, and {INDEX} names it" if index else "it is missing, and so is an index"
                raise CheckpointError(str(path), what, "Copy the whole folder again; weights must be .safetensors.")
            header, facts = tensorfile.read_header(path), path.stat()
            files |= dict.fromkeys(header.shapes, name)
            shapes |= header.shapes
            dtypes |= header.dtypes
            told.append(f"{name} {facts.st_size} {facts.st_mtime_ns}")
        for tensor, name in index.items():
            if files.get(tensor) != name:
                found = f"tensor {tensor!r:.80} is not in it, and {INDEX} says that it is"
                raise CheckpointError(str(folder / name), found, "The files are of different models: copy them again.")
        return cls(folder, files, shapes, dtypes, " ".join(told))

    def tensors(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Some tensors by name, mapped from their files.

        Raises:
            CheckpointError: a file has been changed or removed in the meantime.
        """
        from safetensors import SafetensorError, safe_open

        found: dict[str, Tensor] = {}
        by_file: dict[str, list[str]] = {}
        for name in names:
            by_file.setdefault(self.files[name], []).append(name)
        for file, some in by_file.items():
            path = self.folder / file
            try:
                with safe_open(str(path), framework="pt", device="cpu") as held:
                    found |= {name: held.get_tensor(name) for name in some}
            except (SafetensorError, OSError) as error:
                raise CheckpointError(str(path), f"it cannot be read any more: {error}", "Start again.") from error
            for name in some:
                if (tuple(found[name].shape), found[name].dtype) != (self.shapes[name], self.dtypes[name]):
                    raise CheckpointError(str(path), f"tensor {name!r:.80} has changed", "Start again.")
        return found

    def misfit(self, model: nn.Module) -> str | None:
        """Why these are not the weights of a model; None if every parameter and buffer has one."""
        for names, tensor in _stored(model):
            here = [name for name in names if name in self.shapes]
            if not here:
                return f"there is no tensor {names[0]!r:.80}, which the model of config.json has"
            if self.shapes[here[0]] != tuple(tensor.shape):
                shapes = f"{self.shapes[here[0]]}, and that of the model of config.json is {tuple(tensor.shape)}"
                return f"tensor {here[0]!r:.80} is {shapes}"
        return None

    def spare(self, model: nn.Module) -> list[str]:
        """Names of tensors that a model has no place for."""
        known = {name for names, _ in _stored(model) for name in names}
        return sorted(set(self.files) - known)


def _index(folder: Path) -> dict[str, str]:
    """By tensor, its file, as the index says; empty if there is none."""
    path = folder / INDEX
    if not path.is_file():
        return {}
    try:
        found = json.loads(atomic.read_file(path, limit=_LONGEST_INDEX))["weight_map"]
        plain = {str(name): Path(str(file)).name for name, file in found.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(str(path), "it is no index of tensors", "Copy the folder again.") from error
    if not plain:
        raise CheckpointError(str(path), "it names no tensor", "Copy the folder again.")
    return plain


def _stored(model: nn.Module) -> Iterator[tuple[list[str], Tensor]]:
    """Each parameter and persistent buffer with all its names."""
    found: dict[int, tuple[list[str], Tensor]] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        dot = f"{prefix}." if prefix else ""
        held: list[tuple[str, Tensor | None]] = [*module._parameters.items()]
        held += [(n, b) for n, b in module._buffers.items() if n not in module._non_persistent_buffers_set]
        for name, tensor in held:
            if tensor is not None:
                found.setdefault(id(tensor), ([], tensor))[0].append(dot + name)
    yield from found.values()


def fill_from(shards: Shards, model: nn.Module, prefix: str = "", leave: Iterable[str] = ()) -> None:
    """Give a model the folder's tensors, without copying. What is shared stays shared.

    Args:
        shards: of which `misfit` has found nothing.
        model: whose tensors are on the meta device.
        prefix: of its tensors' names in the folder, with a dot at the end.
        leave: paths of modules that stay without values.
    """
    left = tuple(f"{path}." for path in leave)
    wanted: dict[int, tuple[str, Tensor]] = {}
    for names, tensor in _stored(model):
        stored = next((prefix + name for name in names if prefix + name in shards.files), None)
        if stored is not None and not any(name.startswith(left) for name in names):
            wanted[id(tensor)] = (stored, tensor)
    values = shards.tensors(name for name, _ in wanted.values())
    made: dict[int, Tensor] = {}
    for key, (name, old) in wanted.items():
        value = values[name]
        made[key] = nn.Parameter(value, old.requires_grad) if isinstance(old, nn.Parameter) else value
    for module in model.modules():
        for name, there in [*module._parameters.items(), *module._buffers.items()]:
            if there is not None and id(there) in made:
                setattr(module, name, made[id(there)])


def write_shards(
    folder: Path, parts: Iterable[tuple[Mapping[str, Tensor], Callable[[str], Tensor]]], count: int
) -> None:
    """Write tensors as a folder that transformers reads: a file for each part, and an index.

    Args:
        folder: it exists.
        parts: the tensors of each file, of which shapes and dtypes count, and a function that gives their values.
        count: of the parts.

    Raises:
        CheckpointError: a file cannot be written.
    """
    places: dict[str, str] = {}
    size = 0
    for number, (tensors, value) in enumerate(parts, 1):
        name = f"model-{number:05d}-of-{count:05d}.safetensors"
        tensorfile.write_tensors(folder / name, tensors, {"format": "pt"}, value)
        places |= dict.fromkeys(tensors, name)
        size += sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(places.items()))}
    text = json.dumps(index, indent=2) + "\n"
    atomic.write_atomically(folder / INDEX, lambda file: file.write(text.encode()))
