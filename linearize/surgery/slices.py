"""Slices of tensors without branches on tensor values, so that tracing, TorchScript and exporters understand them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def every(x: Tensor, steps: list[int]) -> Tensor:
    """Every so many positions along the last axes.

    Examples:
        >>> every(torch.arange(5), [2]).tolist()
        [0, 2, 4]
    """
    if max(steps) == 1:
        return x
    if len(steps) == 1:
        return x[..., :: steps[0]]
    if len(steps) == 2:
        return x[..., :: steps[0], :: steps[1]]
    return x[..., :: steps[0], :: steps[1], :: steps[2]]


def part(x: Tensor, axis: int, start: int, stop: int) -> Tensor:
    """A slice along one axis, counted from the end.

    Examples:
        >>> part(torch.arange(6).view(2, 3), -1, 1, 2).tolist()
        [[1], [4]]
    """
    if axis == -1:
        return x[..., start:stop]
    if axis == -2:
        return x[..., start:stop, :]
    if axis == -3:
        return x[..., start:stop, :, :]
    if axis == -4:
        return x[..., start:stop, :, :, :]
    return x.movedim(axis, -1)[..., start:stop].movedim(-1, axis)


def rest_from(x: Tensor, axis: int, start: int) -> Tensor:
    """The slice from `start` on.

    Examples:
        >>> rest_from(torch.arange(6).view(2, 3), -1, 1).tolist()
        [[1, 2], [4, 5]]
    """
    return part(x, axis, start, 0x7FFFFFFFFFFFFFFF)


def ones_beside(x: Tensor, width: int) -> Tensor:
    """Ones of shape (..., width), of the type that a linear layer would put out here (autocast)."""
    ones = functional.pad(x[..., :0], [0, width], value=1.0)
    if not torch.jit.is_scripting():  # type: ignore[attr-defined]
        kind = x.device.type
        if torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
            ones = ones.to(torch.get_autocast_dtype(kind))
    return ones
