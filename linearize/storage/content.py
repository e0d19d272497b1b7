"""Which tensors of a model a file holds, and what they must be like."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from linearize.algebra.finite import all_finite
from linearize.errors import CheckpointError
from linearize.gating.sharded import REMEDY, is_sharded
from linearize.storage import tensorfile
from linearize.storage.manifest import Manifest
from linearize.zoo.structure import stored_tensors

__all__ = ["check_value", "is_plain_tensor", "tensors_to_store"]


def tensors_to_store(model: nn.Module, content: Manifest) -> dict[str, Tensor]:
    """The tensors to store, each once; ``content`` learns their further names, and which are frozen."""
    first: dict[Any, str] = {}
    tensors: dict[str, Tensor] = {}
    for name, tensor in stored_tensors(model).items():
        key: Any = id(tensor)
        if is_plain_tensor(tensor) and not tensor.is_meta and tensor.data_ptr():
            key = (str(tensor.device), tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if key in first:
            content.aliases[name] = first[key]
            continue
        first[key] = name
        tensors[name] = tensor
        if isinstance(tensor, nn.Parameter) and not tensor.requires_grad:
            content.frozen.append(name)
    return tensors


def is_plain_tensor(tensor: Tensor) -> bool:
    """Whether a tensor is of torch itself, and dense."""
    return type(tensor) in (Tensor, nn.Parameter, nn.Buffer) and tensor.layout is torch.strided


def check_value(name: str, tensor: Tensor) -> None:
    """Check a tensor that is to be written.

    Raises:
        CheckpointError: it has no values, is a shard, of a kind that the format cannot hold, or not finite.
    """
    if tensor.is_meta:
        raise CheckpointError(name, "it is on the meta device and has no values", "Load weights before saving.")
    if is_sharded(tensor):
        raise CheckpointError(name, "it is sharded over processes", REMEDY)
    if not is_plain_tensor(tensor) or tensor.dtype not in tensorfile.DTYPE_NAMES:
        found = f"it is a {type(tensor).__name__} of {tensor.dtype}, which the format cannot hold"
        raise CheckpointError(name, found, "Turn it into a plain tensor (dequantize it) before saving.")
    if tensor.is_floating_point() and tensor.element_size() > 1 and not _is_finite(tensor):
        remedy = "Save the model from before training went wrong, or repair this tensor."
        raise CheckpointError(name, "it holds NaN or infinite values", remedy)


def _is_finite(tensor: Tensor) -> bool:
    if isinstance(tensor, nn.Parameter):
        return all_finite(tensor)
    # A buffer may be a mask with -inf, or a bound that is still open.
    return not bool(tensor.isnan().any())
