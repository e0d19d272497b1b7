"""One .safetensors file: written whole or not at all, and looked over before it is read.

The layout is that of the safetensors format: eight bytes with the length of the header, a JSON header, the
tensors. Written here and not by the safetensors library because a model must be streamed tensor by tensor
(a model on a GPU need not fit into main memory twice) to a file that is flushed to the disk before it takes
its name.
"""

from __future__ import annotations

import json
import math
import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from linearize.errors import CheckpointError

MAX_HEADER = 100_000_000
"""Longest header in bytes, as the safetensors library has it."""

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
}
DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
"""The tensor dtypes that a file can hold."""


@dataclass(frozen=True)
class Header:
    """What stands in front of the tensors.

    Attributes:
        shapes: shape of each tensor by name.
        metadata: the file's own texts.
    """

    shapes: dict[str, tuple[int, ...]]
    metadata: dict[str, str]

    @property
    def elements(self) -> int:
        """Elements of all tensors together."""
        return sum(math.prod(shape) for shape in self.shapes.values())


def write(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a file beside ``path``, flush it to the disk, then rename it; a failure leaves the old file.

    Raises:
        CheckpointError: the folder is missing or not writable, or the disk is full.
    """
    target = Path(os.path.realpath(path))
    beside = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        try:
            # x: never write into a file that someone else has opened under this name.
            with beside.open("xb") as file:
                _stream(file, tensors, metadata)
                file.flush()
                os.fsync(file.fileno())
            beside.replace(target)
        except BaseException:
            beside.unlink(missing_ok=True)
            raise
        _sync_folder(target.parent)
    except OSError as error:
        found = f"it cannot be written: {error.strerror or error}"
        remedy = "Free some space or choose another folder; a file that was there before is as it was."
        raise CheckpointError(str(path), found, remedy) from error


def _stream(file: Any, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    # Wide dtypes first: then every tensor is aligned, and can be mapped into memory where it lies.
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    entries: dict[str, Any] = {"__metadata__": dict(metadata)}
    offset = 0
    for name in names:
        tensor = tensors[name]
        end = offset + tensor.numel() * tensor.element_size()
        dtype = DTYPE_NAMES[tensor.dtype]
        entries[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    if len(header) > MAX_HEADER:
        raise CheckpointError(str(file.name), "the description of the model is too long", "Report this model.")
    file.write(len(header).to_bytes(8, "little"))
    file.write(header)
    for name in names:
        file.write(_bytes(tensors[name]))


def _bytes(tensor: Tensor) -> memoryview:
    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    if flat.is_complex():
        flat = torch.view_as_real(flat.resolve_conj()).reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy())  # type: ignore[arg-type]


def _sync_folder(folder: Path) -> None:
    if os.name != "posix":  # other systems do not open folders, and rename safely without
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_header(path: Path) -> Header:
    """Read and check what stands in front of the tensors.

    Raises:
        CheckpointError: there is no such file, it is a folder, it is truncated, or not in safetensors format.
    """
    if path.is_dir():
        raise CheckpointError(str(path), "it is a folder", "Pass the path of a .safetensors file.")
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            raw = file.read(min(length, MAX_HEADER, size)) if size >= 8 else b""
    except FileNotFoundError as error:
        raise CheckpointError(str(path), "there is no such file", "Check the path.") from error
    except OSError as error:
        raise CheckpointError(str(path), f"it cannot be read: {error.strerror or error}", "Check the file.") from error
    if size < 8:
        raise _truncated(path, f"it ends after {size} bytes")
    if raw[:1] != b"{" or length > MAX_HEADER:
        raise _foreign(path, "it does not start like a safetensors file")
    if 8 + length > size:
        raise _truncated(path, f"its header should have {length} bytes, {size - 8} are there")
    try:
        return _parse(path, json.loads(raw), size - 8 - length)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise _foreign(path, "its header is not that of a safetensors file") from error


def _parse(path: Path, entries: Any, room: int) -> Header:
    metadata = entries.pop("__metadata__", {})
    if not all(isinstance(text, str) for item in metadata.items() for text in item):
        raise _foreign(path, "its metadata is not text")
    shapes, reach = {}, 0
    for name, entry in entries.items():
        shape, (start, end) = tuple(entry["shape"]), entry["data_offsets"]
        if not all(type(n) is int and n >= 0 for n in (*shape, start, end)):
            raise _foreign(path, f"the shape of {name!r:.80} is not one")
        if entry["dtype"] not in _DTYPES:
            raise _foreign(path, f"the dtype of {name!r:.80} is {entry['dtype']!r:.20}")
        if end - start != math.prod(shape) * _DTYPES[entry["dtype"]].itemsize:
            raise _foreign(path, f"the size of {name!r:.80} is not that of its shape")
        shapes[name], reach = shape, max(reach, end)
    if reach > room:
        raise _truncated(path, f"its tensors should take {reach} bytes, {room} are there")
    return Header(shapes, dict(metadata))


def read_tensors(path: Path, device: str | torch.device) -> dict[str, Tensor]:
    """Read all tensors onto ``device``; on the CPU they are mapped, and read when they are needed.

    Raises:
        CheckpointError: the file is not in safetensors format.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors: dict[str, Tensor] = load_file(path, device=str(device))
    except (SafetensorError, OSError, ValueError) as error:
        raise _foreign(path, f"the safetensors library refuses it: {error}") from error
    return tensors


def _truncated(path: Path, found: str) -> CheckpointError:
    return CheckpointError(str(path), f"it is truncated: {found}", "Copy or save the file again.")


def _foreign(path: Path, found: str) -> CheckpointError:
    return CheckpointError(str(path), found, "Pass a file that linearize.save wrote.")
