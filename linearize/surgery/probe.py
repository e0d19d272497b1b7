"""Read the affine map of a module with its own forward: run it, see what it passes to torch, and check the result.

This finds standardised or normalised weights, and padding that depends on the input's size, without knowing any class.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from linearize.algebra.affine import Affine, apply, dense
from linearize.algebra.piece import Infeasible
from linearize.sites.site import Port

_FORWARDS = {nn.Linear.forward, nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward}
_CALLS: dict[Any, int] = {functional.linear: 0, torch.addmm: 0, torch.conv1d: 1, torch.conv2d: 2, torch.conv3d: 3}
# Rounding in float64 over sums of some thousand terms.
_TOLERANCE = 1e-10


def has_own_forward(module: nn.Module) -> bool:
    """True if torch's own forward runs on the module's weight, and no hook comes in between."""
    hooked = module._forward_pre_hooks or module._forward_hooks
    padded_otherwise = getattr(module, "padding_mode", "zeros") != "zeros"
    return type(module).forward in _FORWARDS and not hooked and not padded_otherwise


class _Catch(TorchFunctionMode):
    """Notes the linear operations that a forward makes."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _CALLS:
            self.calls.append((func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def probed(port: Port, module: nn.Module) -> Affine:
    """The affine map that a module computes, in float64, checked on inputs of several sizes.

    Raises:
        Infeasible: it computes something else.
    """
    try:
        return _probed(port, copy.deepcopy(module).double().eval())
    except Infeasible:
        raise
    except Exception as error:  # the module's own code, on inputs that it may not take
        raise Infeasible(f"{port.module} does not run by itself ({type(error).__name__}: {error})") from error


def _probed(port: Port, twin: nn.Module) -> Affine:
    weight: Any = twin.weight
    inputs = weight.shape[0] if port.transposed else weight.shape[1] * int(getattr(twin, "groups", 1))
    generator = torch.Generator().manual_seed(0)

    def sample(size: int) -> Tensor:
        sizes = (2, inputs, *(size,) * port.dims) if port.dims else (size, inputs)
        return torch.randn(sizes, generator=generator, dtype=torch.float64).to(weight.device)

    span = max((k - 1) * d for k, d in _extent(twin)) if port.dims else 0
    affine = _caught(port, twin, sample(span + 3))
    trials = [sample(span + 2), sample(span + 3), sample(2 * span + 5)]
    for candidate in (affine, replace(affine, same=True)) if port.dims else (affine,):
        if all(_agree(twin, candidate, trial) for trial in trials):
            return candidate
    raise Infeasible(f"{port.module} computes more than a linear map")


def _extent(module: Any) -> list[tuple[int, int]]:
    kernel = module.weight.shape[2:]
    return list(zip(kernel, getattr(module, "dilation", (1,) * len(kernel)), strict=True))


def _caught(port: Port, module: Callable[[Tensor], Any], x: Tensor) -> Affine:
    with _Catch() as catch:
        module(x)
    if len(catch.calls) != 1 or _CALLS[catch.calls[0][0]] != port.dims:
        raise Infeasible(f"{port.module} makes {len(catch.calls)} linear operations")
    func, args, kwargs = catch.calls[0]
    if func is torch.addmm:
        bias, _, weight = args[:3]
        weight = weight.t()
    else:
        weight, bias = _given(args, kwargs, 1, "weight"), _given(args, kwargs, 2, "bias")
    bias = weight.new_zeros(weight.shape[0]) if bias is None else bias
    if port.dims == 0:
        return Affine(weight.detach().clone(), bias.detach().clone())
    stride, padding, dilation = (
        _sizes(_given(args, kwargs, index, name, default), port.dims)
        for index, name, default in ((3, "stride", 1), (4, "padding", 0), (5, "dilation", 1))
    )
    groups = _given(args, kwargs, 6, "groups", 1)
    return Affine(dense(weight.detach().clone(), groups), bias.detach().clone(), stride, padding, dilation)


def _given(args: tuple[Any, ...], kwargs: dict[str, Any], index: int, name: str, default: Any = None) -> Any:
    return args[index] if len(args) > index else kwargs.get(name, default)


def _sizes(value: Any, dims: int) -> tuple[int, ...]:
    if isinstance(value, str):
        raise Infeasible(f"its padding is {value!r}")
    return tuple(value) if isinstance(value, (tuple, list)) and len(value) == dims else (int(value),) * dims


def _agree(module: Callable[[Tensor], Any], affine: Affine, x: Tensor) -> bool:
    mine, theirs = apply(affine, x), module(x)
    if not isinstance(theirs, Tensor) or mine.shape != theirs.shape:
        return False
    return float((mine - theirs).abs().max()) <= _TOLERANCE * max(1.0, float(theirs.abs().max()))


def padding_of(module: Any) -> tuple[int, ...]:
    """Padding in numbers, also where the convolution says "same" or "valid"."""
    if not isinstance(module.padding, str):
        return tuple(module.padding)
    if module.padding == "valid":
        return (0,) * len(module.kernel_size)
    totals = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
    if any(total % 2 for total in totals):
        raise Infeasible("its padding is not the same on both sides")
    return tuple(total // 2 for total in totals)
