"""Fused paths of torch's transformer layers. They compute an activation without calling it.

In eval mode without gradients, `nn.TransformerEncoderLayer` hands its weights to one kernel if its attribute
`activation_relu_or_gelu` names an activation that the kernel knows. A gate is not one of these. So the attribute
becomes 0, as the layer itself sets it for any other activation, and the layer's plain code runs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from linearize.errors import ConvertError
from linearize.sites.record import Step
from linearize.surgery.subclass import subclass

SWITCH = "activation_relu_or_gelu"
_BEFORE = "_linearize_fused"
UNFUSED = "Unfused"


def unfuse(module: nn.Module, options: dict[str, Any]) -> nn.Module:  # noqa: ARG001 - as the other builders
    """Switch off a layer's fused path, in place. Nested tensors, which only that path accepts, still work.

    Raises:
        ConvertError: the module has no such switch.
    """
    if not isinstance(vars(module).get(SWITCH), int):
        found = f"has no attribute {SWITCH}, by which its fused path is switched off"
        raise ConvertError(type(module).__name__, found, "Load it onto the model that it was made from.")
    vars(module)[_BEFORE] = vars(module)[SWITCH]
    vars(module)[SWITCH] = 0
    _take_nested(module)
    return module


def fuse(module: nn.Module) -> None:
    """Undo `unfuse`."""
    vars(module)[SWITCH] = vars(module).pop(_BEFORE)
    module.__class__ = type(module).__mro__[1]


def _take_nested(module: nn.Module) -> None:
    original: Any = type(module)

    @functools.wraps(original.forward)
    def forward(self: nn.Module, src: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        masked = any(isinstance(value, Tensor) for value in (*args, *kwargs.values()))
        if not src.is_nested or src.layout is not torch.strided or masked:
            out: Tensor = original.forward(self, src, *args, **kwargs)
            return out
        return _padded(functools.partial(original.forward, self), src)

    module.__class__ = subclass(original, {"forward": forward}, _take_nested)


def _padded(forward: Callable[..., Tensor], src: Tensor) -> Tensor:
    """A layer's plain code on sequences of several lengths: padded, and the padding masked."""
    padded = src.to_padded_tensor(0.0)
    lengths = src._nested_tensor_size()[:, 0].to(padded.device)
    inside = torch.arange(padded.shape[1], device=padded.device) < lengths[:, None]
    out: Tensor = torch._nested_tensor_from_mask(forward(padded, src_key_padding_mask=~inside), inside)
    return out


def fuse_again(model: nn.Module, steps: list[Step]) -> list[Step]:
    """Switch fused paths on again where they would miss nothing. Returns the steps that remain.

    Args:
        model: after collapsing.
        steps: all that made it. Linear maps with a bias, of whatever width, are what a fused path reads.
    """
    kept: list[Step] = []
    for position, step in enumerate(steps):
        later = steps[position + 1 :]
        if step["module"]["type"] == UNFUSED and not any(_concerns(other, step["path"]) for other in later):
            fuse(model.get_submodule(step["path"]))
        else:
            kept.append(step)
    return kept


def _concerns(step: Step, path: str) -> bool:
    """Whether a step changes a module, or replaces it, in a way that its fused path would not see."""
    around = step["path"] == path or path.startswith(f"{step['path']}." if step["path"] else "")
    inside = step["path"].startswith(f"{path}." if path else "")
    return around or (inside and not _is_plain(step["module"]))


def _is_plain(spec: dict[str, Any]) -> bool:
    return bool(spec["type"] == "Linear" and spec.get("bias"))
