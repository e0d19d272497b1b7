"""Linear maps that a collapsed model may contain besides torch's own: they carry the merged term past the activation.

So the forward code around a site can stay as it is. Shape letters: K channels that stay nonlinear, O output features, I
input features. There is one class per number of spatial dimensions, described by its mixin.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from linearize.algebra.affine import same_padding
from linearize.errors import UsageError


def _every(x: Tensor, steps: tuple[int, ...]) -> Tensor:
    """Every so many positions along the last axes."""
    if all(step == 1 for step in steps):
        return x
    index: Any = (..., *(slice(None, None, step) for step in steps))
    return x[index]


class CarryLinear(nn.Linear):
    """Consumer of a site that carries its output: `weight @ h[:K] + h[K + start : K + start + O] + bias`."""

    def __init__(self, in_features: int, out_features: int, bias: bool, start: int) -> None:
        super().__init__(in_features, out_features, bias)
        self.start = start

    def forward(self, input: Tensor) -> Tensor:
        k, o = self.in_features, self.out_features
        rows = input.flatten(0, -2) if input.dim() > 1 else input[None]
        carried = rows[:, k + self.start : k + self.start + o]
        if self.bias is not None:
            carried = carried + self.bias
        out = torch.addmm(carried, rows[:, :k], self.weight.t())
        return out.view(*input.shape[:-1], o)


class _CarryConv(nn.Module):
    """Consumer of a site that carries its output, as a pointwise convolution."""

    start: int

    def forward(self, input: Tensor) -> Tensor:
        conv: Any = self
        axis = input.dim() - len(conv.kernel_size) - 1
        carried = _every(input.narrow(axis, conv.in_channels + self.start, conv.out_channels), conv.stride)
        out: Tensor = conv._conv_forward(input.narrow(axis, 0, conv.in_channels), conv.weight, conv.bias) + carried
        return out


class CarryConv1d(_CarryConv, nn.Conv1d):
    pass


class CarryConv2d(_CarryConv, nn.Conv2d):
    pass


class CarryConv3d(_CarryConv, nn.Conv3d):
    pass


class _InputCarryConv(nn.Module):
    """Producer of a site that carries its input: its own output, then the input, then `ones` channels of ones."""

    ones: int

    def forward(self, input: Tensor) -> Tensor:
        conv: Any = self
        axis = input.dim() - len(conv.kernel_size) - 1
        carried = _every(input, conv.stride)
        parts = [conv._conv_forward(input, conv.weight, conv.bias), carried]
        if self.ones:
            parts.append(torch.ones_like(carried.narrow(axis, 0, self.ones)))
        return torch.cat(parts, dim=axis)


class InputCarryConv1d(_InputCarryConv, nn.Conv1d):
    pass


class InputCarryConv2d(_InputCarryConv, nn.Conv2d):
    pass


class InputCarryConv3d(_InputCarryConv, nn.Conv3d):
    pass


class _SameConv(nn.Module):
    """A convolution that pads by the "SAME" rule: as many outputs as inputs, divided by the stride and rounded up."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        conv: Any = self
        sizes = tuple(input.shape[-len(conv.kernel_size) :])
        padded = functional.pad(input, same_padding(sizes, conv.kernel_size, conv.stride, conv.dilation))
        inner: Any = super()
        out: Tensor = inner._conv_forward(padded, weight, bias)
        return out


class SameConv1d(_SameConv, nn.Conv1d):
    pass


class SameConv2d(_SameConv, nn.Conv2d):
    pass


class SameConv3d(_SameConv, nn.Conv3d):
    pass


class _BorderConv(nn.Module):
    """A convolution whose bias came through zero padding: near the border only a part of it holds.

    `border` (O, 1, kernel) is the kernel of a constant-one channel that is padded with zeros like every other channel.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        conv: Any = self
        self.border = nn.Parameter(torch.zeros(conv.out_channels, 1, *conv.kernel_size))

    def forward(self, input: Tensor) -> Tensor:
        conv: Any = self
        dims = len(conv.kernel_size)
        ones = input.new_ones(1, 1, *input.shape[-dims:])
        bias = conv._conv_forward(ones, self.border, conv.bias)
        out: Tensor = conv._conv_forward(input, conv.weight, None)
        return out.add(bias if input.dim() == dims + 2 else bias[0])


class BorderConv1d(_BorderConv, nn.Conv1d):
    pass


class BorderConv2d(_BorderConv, nn.Conv2d):
    pass


class BorderConv3d(_BorderConv, nn.Conv3d):
    pass


class BorderSameConv1d(_BorderConv, SameConv1d):
    pass


class BorderSameConv2d(_BorderConv, SameConv2d):
    pass


class BorderSameConv3d(_BorderConv, SameConv3d):
    pass


class OnesLinear(nn.Linear):
    """A linear map with `ones` features of ones put in at `at`: the gate factor of carried channels in a gated unit.

    `out_features` counts the computed features only.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool, at: int, ones: int) -> None:
        super().__init__(in_features, out_features, bias)
        self.at = at
        self.ones = ones

    def forward(self, input: Tensor) -> Tensor:
        y = super().forward(input)
        before, after = y.split((self.at, self.out_features - self.at), dim=-1)
        return torch.cat((before, y.new_ones(*y.shape[:-1], self.ones), after), dim=-1)


class Ones(nn.Module):
    """`width` features of ones, whatever the input: the gate factor of a gated unit that has become linear."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, input: Tensor) -> Tensor:
        kind, dtype = input.device.type, input.dtype
        if torch.is_autocast_enabled(kind) and dtype != torch.float64:  # as a linear layer would do here
            dtype = torch.get_autocast_dtype(kind)
        return input.new_ones(*input.shape[:-1], self.width, dtype=dtype)

    def extra_repr(self) -> str:
        return str(self.width)


_TOLD = (Tensor, type(None), bool, int, float, str, tuple, list, dict, torch.SymInt, torch.SymFloat, torch.SymBool)


class _Only(nn.Module):
    """Stands where a module was called with more than one argument, or gave more: the first of each alone counts.

    Args:
        keyword: the name by which the first argument may come.
        nones: how many None stand behind the result, as attention gives them where its weights are not asked for.

    Raises:
        UsageError: it is told something that is neither a tensor nor plain.
    """

    def __init__(self, *args: Any, keyword: str = "", nones: int = 0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.keyword, self.nones = keyword, nones

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        for value in (*args, *kwargs.values()):
            if not isinstance(value, _TOLD):  # a cache of keys and values, say, that would stay empty
                found = f"stands for a module that was told no {type(value).__name__} when it was replaced, and is now"
                raise UsageError(type(self).__name__, found, "Without caches: pass use_cache=False, or modules=False.")
        out = super().forward(args[0] if args else kwargs[self.keyword])
        return (out, *(None,) * self.nones) if self.nones else out


class OnlyLinear(_Only, nn.Linear):
    pass


class OnlyConv1d(_Only, nn.Conv1d):
    pass


class OnlyConv2d(_Only, nn.Conv2d):
    pass


class OnlyConv3d(_Only, nn.Conv3d):
    pass
