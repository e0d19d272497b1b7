"""One .safetensors file: written completely or not at all, and checked before it is read.

The layout is that of the safetensors format: eight bytes with the length of the header, a JSON header, the
tensors. We write it ourselves, not with the safetensors library, because a model must be written tensor by tensor
(a model on a GPU need not fit into main memory twice) to a file that is flushed to the disk before it gets
its name.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from linearize.errors import CheckpointError
from linearize.schema import parse
from linearize.storage import atomic

MAX_HEADER = 16_000_000
"""Longest header in bytes: a hundred thousand tensors. Parsed, it takes some twenty times that in memory."""
_MAX_DIMS = 16

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
    """The header of the file, in front of the tensors.

    Attributes:
        shapes: shape of each tensor by name.
        metadata: the file's own texts.
        dtypes: dtype of each tensor by name.
    """

    shapes: dict[str, tuple[int, ...]]
    metadata: dict[str, str]
    dtypes: dict[str, torch.dtype]

    def renamed(self, names: Mapping[str, str]) -> Header:
        """The same with other names of tensors."""
        shapes = {names.get(name, name): shape for name, shape in self.shapes.items()}
        return Header(shapes, self.metadata, {names.get(name, name): dtype for name, dtype in self.dtypes.items()})

    def empty(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Tensors in the place of some of the file's, whatever is in them."""
        return {name: torch.empty(self.shapes[name], dtype=self.dtypes[name]) for name in names}

    def hollow(self) -> dict[str, Tensor]:
        """All of the file's tensors, without memory."""
        return {name: torch.empty(shape, dtype=self.dtypes[name], device="meta") for name, shape in self.shapes.items()}

    @property
    def size(self) -> int:
        """Bytes of all tensors and texts together."""
        tensors = sum(math.prod(shape) * self.dtypes[name].itemsize for name, shape in self.shapes.items())
        return tensors + sum(len(name) + len(text) for name, text in self.metadata.items())

    @property
    def elements(self) -> int:
        """Elements of all tensors together."""
        return sum(math.prod(shape) for shape in self.shapes.values())


def write_tensors(
    path: Path,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    value: Callable[[str], Tensor] | None = None,
) -> None:
    """Write a file completely or not at all: to another name, flushed, then renamed. A failure leaves the old file.

    Args:
        path: of the file.
        tensors: by name. With `value`, only their shapes and dtypes count; they may be on the meta device.
        metadata: texts by name.
        value: makes a tensor when it is its turn to be written; one of them at a time is in memory. Names of equally
            wide dtypes come in alphabetical order.

    Raises:
        CheckpointError: the folder is missing or not writable, or the disk is full.
    """
    atomic.write_atomically(path, lambda file: _stream(file, tensors, metadata, value or tensors.__getitem__))


def _stream(
    file: Any, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], value: Callable[[str], Tensor]
) -> None:
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
        tensor = value(name)
        if (tensor.shape, tensor.dtype) != (tensors[name].shape, tensors[name].dtype):
            found = f"it became {tuple(tensor.shape)} of {tensor.dtype}, not {tuple(tensors[name].shape)}"
            raise CheckpointError(name, found, "Please report this model.")
        file.write(_bytes(tensor))


def _bytes(tensor: Tensor) -> memoryview:
    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    if flat.is_complex():
        flat = torch.view_as_real(flat.resolve_conj()).reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy())  # type: ignore[arg-type]


def read_header(path: Path) -> Header:
    """Read and check the header of a file.

    Raises:
        CheckpointError: there is no such file, it is something else than a file, it is truncated, or not in
            safetensors format.
    """
    size = atomic.check_readable(path)
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            first = file.read(1)
            fits = first == b"{" and length <= min(MAX_HEADER, size)
            raw = first + file.read(length - 1) if fits else first
    except OSError as error:
        raise CheckpointError(str(path), f"it cannot be read: {error.strerror or error}", "Check the file.") from error
    if size < 8:
        raise _truncated(path, f"it ends after {size} bytes")
    if first != b"{" or length > 2**40:
        raise _foreign(path, "it does not start like a safetensors file")
    if length > MAX_HEADER:
        raise _foreign(path, f"its header has {length} bytes, more than the {MAX_HEADER} that a model needs")
    if 8 + length > size:
        raise _truncated(path, f"its header should have {length} bytes, {size - 8} are there")
    try:
        return _parse(path, parse(raw), size - 8 - length)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise _foreign(path, "its header is not that of a safetensors file") from error


def _parse(path: Path, entries: Any, room: int) -> Header:
    metadata = entries.pop("__metadata__", {})
    if not all(isinstance(text, str) for item in metadata.items() for text in item):
        raise _foreign(path, "its metadata is not text")
    header, reach = Header({}, dict(metadata), {}), 0
    for name, entry in entries.items():
        shape, (start, end) = tuple(entry["shape"]), entry["data_offsets"]
        if len(shape) > _MAX_DIMS or not all(type(n) is int and 0 <= n < 2**63 for n in (*shape, start, end)):
            raise _foreign(path, f"the shape of {name!r:.80} is not one")
        if entry["dtype"] not in _DTYPES:
            raise _foreign(path, f"the dtype of {name!r:.80} is {entry['dtype']!r:.20}")
        if end - start != math.prod(shape) * _DTYPES[entry["dtype"]].itemsize:
            raise _foreign(path, f"the size of {name!r:.80} is not that of its shape")
        header.shapes[name], header.dtypes[name] = shape, _DTYPES[entry["dtype"]]
        reach = max(reach, end)
    if reach > room:
        raise _truncated(path, f"its tensors should take {reach} bytes, {room} are there")
    return header


def read_tensors(path: Path, device: str | torch.device) -> dict[str, Tensor]:
    """Read all tensors onto ``device``. On the CPU they are mapped, and read when they are needed.

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


def read_tensor(path: Path, name: str) -> Tensor:
    """One tensor, mapped.

    Raises:
        CheckpointError: the file is not in safetensors format, or has no such tensor.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt", device="cpu") as held:
            tensor: Tensor = held.get_tensor(name)
    except (SafetensorError, OSError, ValueError) as error:
        raise _foreign(path, f"the safetensors library refuses it: {error}") from error
    return tensor


def _truncated(path: Path, found: str) -> CheckpointError:
    return CheckpointError(str(path), f"it is truncated: {found}", "Copy or save the file again.")


def _foreign(path: Path, found: str) -> CheckpointError:
    return CheckpointError(str(path), found, "Pass a file that linearize.save wrote.")
