"""The constant maps between the linear maps of a site: their values, and what remains after folding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from linearize.algebra.affine import norm_scale_shift
from linearize.algebra.constants import evaluate
from linearize.errors import CheckpointError
from linearize.sites.site import Fold

__all__ = ["neutralize", "scale_shift", "what_is_left"]


def scale_shift(fold: Fold, tensor: Callable[[str], Tensor], channels: int) -> tuple[Tensor, Tensor]:
    """Scale and shift of a constant map, both float64 (C,).

    Args:
        fold: the map.
        tensor: gives the parameter or buffer of a name.
        channels: how many values there are.
    """
    weight, bias, mean, var = (
        None if name is None else tensor(name) for name in (fold.weight, fold.bias, fold.mean, fold.var)
    )
    scale, shift = norm_scale_shift(weight, bias, mean, var, fold.eps, channels)
    if fold.scale is not None:
        factor = evaluate(fold.scale, tensor)
        scale, shift = scale.to(factor.device) * factor, shift.to(factor.device) * factor
    if fold.shift is not None:
        added = evaluate(fold.shift, tensor)
        place = scale.device if added.numel() == 1 else added.device
        scale, shift = scale.to(place), shift.to(place) + added.to(place)
    return scale.expand(channels), shift.expand(channels)


def what_is_left(fold: Fold) -> dict[str, Any]:
    """The description of the module that remains after folding."""
    if fold.neutral:
        return {"type": "Neutral", "values": {name.rpartition(".")[2]: value for name, value in fold.neutral}}
    if fold.children:
        return {"type": "Children", "names": list(fold.children)}
    return {"type": "Identity"}


def neutralize(module: nn.Module, options: dict[str, Any]) -> nn.Module:
    """Set parameters and buffers of a module to one number, with size 1 in every dimension, which fits any width.

    Raises:
        CheckpointError: the module has no such parameter, or the number is neither 0 nor 1.

    Examples:
        >>> layer = neutralize(nn.LayerNorm(4), {"values": {"weight": 1.0}})
        >>> layer.weight.tolist()
        [1.0]
    """
    values = {str(name): float(value) for name, value in options["values"].items()}
    for name, value in values.items():
        held: Any = module._parameters.get(name, module._buffers.get(name))
        if held is None or value not in (0.0, 1.0):
            found = f"cannot set {name!r} to {value:g}"
            raise CheckpointError(type(module).__name__, found, "Load the file onto the model that it was made from.")
        made = torch.full((1,) * held.dim(), value, dtype=held.dtype, device=held.device)
        if name in module._parameters:
            module._parameters[name] = nn.Parameter(made, requires_grad=held.requires_grad)
        else:
            module._buffers[name] = made
    return module
