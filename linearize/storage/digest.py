"""Digests of tensors. They show damage, and recognise data."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["take_in"]


def take_in(told: Any, tensor: Tensor) -> None:
    """Add a tensor to a hash of `hashlib`: its shape, its dtype and every byte of it.

    Of a tensor without bytes to read (on the meta device, sparse, or of another library) only shape and dtype count.

    Examples:
        >>> import hashlib
        >>> a, b = hashlib.sha256(), hashlib.sha256()
        >>> take_in(a, torch.tensor([1.0, 2.0]))
        >>> take_in(b, torch.tensor([2.0, 1.0]))
        >>> a.hexdigest() == b.hexdigest()
        False
    """
    told.update(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
    if tensor.is_meta or tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_nested:
        return
    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    if flat.is_complex():
        flat = torch.view_as_real(flat.resolve_conj()).reshape(-1)
    told.update(memoryview(flat.view(torch.uint8).numpy()))  # type: ignore[arg-type]
