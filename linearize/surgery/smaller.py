"""Tensors of a module that become smaller where the module itself stays, such as the parameters of all experts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from linearize.errors import CheckpointError

__all__ = ["SMALLER", "put_smaller", "smaller_step"]

SMALLER = "Smaller"


def put_smaller(module: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Put tensors in the place of larger ones of the same names, in place; the description of what was done.

    Parameters stay parameters, and frozen ones stay frozen.

    Raises:
        CheckpointError: there is no larger tensor of the same number of dimensions.

    Examples:
        >>> layer = nn.Linear(4, 3)
        >>> put_smaller(layer, {"weight": layer.weight[:2], "bias": layer.bias[:2]})
        {'type': 'Smaller', 'shapes': {'weight': [2, 4], 'bias': [2]}}
        >>> layer(torch.ones(4)).shape
        torch.Size([2])
    """
    for name, value in tensors.items():
        _larger(module, name, value.shape)
    for name, value in tensors.items():
        if name in module._parameters:
            old = module._parameters[name]
            made = nn.Parameter(value.detach().clone(), requires_grad=old is not None and old.requires_grad)
            made.__dict__.update({} if old is None else vars(old))
            setattr(module, name, made)
        else:
            module._buffers[name] = value.detach().clone()
    return {"type": SMALLER, "shapes": {name: list(value.shape) for name, value in tensors.items()}}


def smaller_step(current: nn.Module, options: dict[str, Any]) -> nn.Module:
    """Make tensors smaller as a stored step says, when a file is loaded; their values come later."""
    shapes: Mapping[str, Sequence[int]] = options["shapes"]
    made: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        old = _larger(current, name, shape)
        made[name] = torch.zeros(tuple(shape), dtype=old.dtype, device=old.device)
    put_smaller(current, made)
    return current


def _larger(module: nn.Module, name: str, shape: Sequence[int]) -> Tensor:
    """The tensor of a name, if it has as many dimensions, none of them smaller.

    Raises:
        CheckpointError: it has not, or there is none.
    """
    old = module._parameters.get(name, module._buffers.get(name))
    if old is None or old.dim() != len(shape) or any(map(int.__gt__, shape, old.shape)):
        found = f"has no tensor {name!r:.80} that could become one of shape {tuple(shape)!s:.80}"
        raise CheckpointError(type(module).__name__, found, "Load it onto the model that it was made from.")
    return old
