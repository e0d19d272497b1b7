"""The few modules that a collapsed model may contain besides torch's own linear maps.

The hidden tensor of a collapsed site carries the merged term past the activation, so that the forward code around it
can stay as it is. Shape letters: K channels that stay nonlinear, O output features, I input features.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from linearize.algebra.affine import same_padding
from linearize.errors import CheckpointError
from linearize.graph.channels import ACTIVATIONS


def out_of_place(activation: nn.Module) -> nn.Module:
    """The activation itself, or a copy that does not overwrite its input."""
    if not any(getattr(module, "inplace", False) for module in activation.modules()):
        return activation
    activation = copy.deepcopy(activation)
    for module in activation.modules():
        if getattr(module, "inplace", False):
            module.inplace = False  # type: ignore[assignment]
    return activation


class PartialActivation(nn.Module):
    """An activation on the first `keep` channels of `axis` (counted from the end); the others pass.

    Example:
        >>> PartialActivation(nn.ReLU(), keep=1, axis=-1)(torch.tensor([-1.0, -2.0])).tolist()
        [0.0, -2.0]
    """

    def __init__(self, activation: nn.Module, keep: int, axis: int) -> None:
        super().__init__()
        self.activation = out_of_place(activation)
        self.keep = keep
        self.axis = axis

    def forward(self, input: Tensor) -> Tensor:
        x, carry = input, input.shape[self.axis] - self.keep
        if self._interleaved(x) and self.keep >= carry:
            # The kept channels are short runs of memory: to activate all of them and put the others back is faster.
            y: Tensor = self.activation(x)
            y.narrow(self.axis, self.keep, carry).copy_(x.narrow(self.axis, self.keep, carry))
            return y
        kept, carried = x.split((self.keep, carry), dim=self.axis)
        return torch.cat((self.activation(kept), carried), dim=self.axis)

    def _interleaved(self, x: Tensor) -> bool:
        """True for a plain tensor whose channels lie next to each other, where nothing is recorded or traced."""
        if isinstance(self.activation, BlendedActivation):  # it has as many channels as are kept
            return False
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or type(x) is not Tensor:
            return False
        return x.stride(self.axis) == 1 and (x.is_contiguous() or x.movedim(self.axis, -1).is_contiguous())

    def extra_repr(self) -> str:
        return f"keep={self.keep}, axis={self.axis}"


class MaskedActivation(nn.Module):
    """An activation where `linear` is False, and `slope * x + intercept` where it is True: a gate made permanent.

    It stands where linear channels cannot be collapsed into their neighbours.

    Example:
        >>> layer = MaskedActivation(nn.ReLU(), channels=2, axis=-1)
        >>> layer.linear[1] = True
        >>> layer(torch.tensor([-1.0, -2.0])).tolist()
        [0.0, -2.0]
    """

    linear: Tensor
    slope: Tensor
    intercept: Tensor

    def __init__(self, activation: nn.Module, channels: int, axis: int) -> None:
        super().__init__()
        self.activation = out_of_place(activation)
        self.axis = axis
        self.register_buffer("linear", torch.zeros(channels, dtype=torch.bool))
        self.register_buffer("slope", torch.ones(channels))
        self.register_buffer("intercept", torch.zeros(channels))

    def forward(self, input: Tensor) -> Tensor:
        x, y = input, self.activation(input)
        sizes = (-1, *(1,) * (-1 - self.axis))
        line = self.slope.view(sizes).to(x.dtype) * x + self.intercept.view(sizes).to(x.dtype)
        out: Tensor = torch.where(self.linear.view(sizes), line.to(y.dtype), y)
        return out

    def extra_repr(self) -> str:
        return f"channels={self.linear.numel()}, axis={self.axis}"


class BlendedActivation(nn.Module):
    """`h + alpha * (slope * x + intercept - h)` with `h = activation(x)` and one `alpha` per channel, for good.

    What is left of a gate whose channels stopped on their way to a line.

    Example:
        >>> layer = BlendedActivation(nn.ReLU(), channels=2, axis=-1)
        >>> layer.alpha[1] = 0.25
        >>> layer(torch.tensor([-1.0, -1.0])).tolist()
        [0.0, -0.25]
    """

    alpha: Tensor
    slope: Tensor
    intercept: Tensor

    def __init__(self, activation: nn.Module, channels: int, axis: int) -> None:
        super().__init__()
        self.activation = out_of_place(activation)
        self.axis = axis
        self.register_buffer("alpha", torch.zeros(channels))
        self.register_buffer("slope", torch.ones(channels))
        self.register_buffer("intercept", torch.zeros(channels))

    def forward(self, input: Tensor) -> Tensor:
        x, y = input, self.activation(input)
        sizes = (-1, *(1,) * (-1 - self.axis))
        of_y, of_x, of_one = (
            value.view(sizes) for value in (1 - self.alpha, self.alpha * self.slope, self.alpha * self.intercept)
        )
        out: Tensor = torch.addcmul(torch.addcmul(of_one, of_x, x), of_y, y)
        return out.to(y.dtype)

    def extra_repr(self) -> str:
        return f"channels={self.alpha.numel()}, axis={self.axis}"


class Elementwise(nn.Module):
    """An activation function of ATen as a module: what stands in for a call inside somebody's forward.

    Example:
        >>> Elementwise("gelu", {"approximate": "tanh"})(torch.zeros(1)).item()
        0.0
    """

    def __init__(self, function: str, options: dict[str, Any] | None = None) -> None:
        super().__init__()
        if function not in ACTIVATIONS:
            raise CheckpointError(function, "is no activation that linearize knows", f"Known: {sorted(ACTIVATIONS)}.")
        self.function = function
        self.options = dict(options or {})

    def forward(self, input: Tensor) -> Tensor:
        out: Tensor = getattr(torch.ops.aten, self.function)(input, **self.options)
        return out

    def extra_repr(self) -> str:
        return ", ".join([self.function, *(f"{name}={value}" for name, value in self.options.items())])


def _every(x: Tensor, steps: tuple[int, ...]) -> Tensor:
    """Every so many positions along the last axes."""
    index: Any = (..., *(slice(None, None, step) for step in steps))
    return x[index]


class CarryLinear(nn.Linear):
    """Consumer of a site that carries its output: `weight @ h[:K] + h[K + start : K + stop] + bias`."""

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


class _CarryConv:
    """Consumer of a site that carries its output, as a pointwise convolution."""

    start: int

    def _carry(self, conv: Any, input: Tensor) -> Tensor:
        k, o, dims = conv.in_channels, conv.out_channels, len(conv.kernel_size)
        axis = input.dim() - dims - 1
        carried = input.narrow(axis, k + self.start, o)
        if any(step > 1 for step in conv.stride):
            carried = _every(carried, conv.stride)
        out: Tensor = conv._conv_forward(input.narrow(axis, 0, k), conv.weight, conv.bias) + carried
        return out


class CarryConv1d(_CarryConv, nn.Conv1d):
    def forward(self, input: Tensor) -> Tensor:
        return self._carry(self, input)


class CarryConv2d(_CarryConv, nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return self._carry(self, input)


class CarryConv3d(_CarryConv, nn.Conv3d):
    def forward(self, input: Tensor) -> Tensor:
        return self._carry(self, input)


class _InputCarryConv:
    """Producer of a site that carries its input: its own output, then the input, then `ones` channels of ones."""

    ones: int

    def _carry(self, conv: Any, input: Tensor) -> Tensor:
        axis = input.dim() - len(conv.kernel_size) - 1
        carried = input
        if any(step > 1 for step in conv.stride):
            carried = _every(carried, conv.stride)
        parts = [conv._conv_forward(input, conv.weight, conv.bias), carried]
        if self.ones:
            parts.append(torch.ones_like(carried.narrow(axis, 0, self.ones)))
        return torch.cat(parts, dim=axis)


class InputCarryConv1d(_InputCarryConv, nn.Conv1d):
    def forward(self, input: Tensor) -> Tensor:
        return self._carry(self, input)


class InputCarryConv2d(_InputCarryConv, nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return self._carry(self, input)


class InputCarryConv3d(_InputCarryConv, nn.Conv3d):
    def forward(self, input: Tensor) -> Tensor:
        return self._carry(self, input)


class SameConv1d(nn.Conv1d):
    """A convolution that pads by the "SAME" rule: as many outputs as inputs, divided by the stride and rounded up."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        out: Tensor = super()._conv_forward(_same(self, input), weight, bias)
        return out


class SameConv2d(nn.Conv2d):
    """A convolution that pads by the "SAME" rule: as many outputs as inputs, divided by the stride and rounded up."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        out: Tensor = super()._conv_forward(_same(self, input), weight, bias)
        return out


class SameConv3d(nn.Conv3d):
    """A convolution that pads by the "SAME" rule: as many outputs as inputs, divided by the stride and rounded up."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        out: Tensor = super()._conv_forward(_same(self, input), weight, bias)
        return out


def _same(conv: Any, input: Tensor) -> Tensor:
    sizes = tuple(input.shape[-len(conv.kernel_size) :])
    return functional.pad(input, same_padding(sizes, conv.kernel_size, conv.stride, conv.dilation))


class _BorderConv:
    """A convolution whose bias came through zero padding: near the border only a part of it holds.

    `border` (O, 1, kernel) is the kernel of a constant-one channel that is padded with zeros like every other channel.
    """

    border: nn.Parameter

    def _bordered(self, conv: Any, input: Tensor) -> Tensor:
        dims = len(conv.kernel_size)
        ones = input.new_ones(1, 1, *input.shape[-dims:])
        bias = conv._conv_forward(ones, self.border, conv.bias)
        out: Tensor = conv._conv_forward(input, conv.weight, None)
        return out.add(bias if input.dim() == dims + 2 else bias[0])


class BorderConv1d(_BorderConv, nn.Conv1d):
    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.border = nn.Parameter(torch.zeros(self.out_channels, 1, *self.kernel_size))

    def forward(self, input: Tensor) -> Tensor:
        return self._bordered(self, input)


class BorderSameConv1d(_BorderConv, SameConv1d):
    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.border = nn.Parameter(torch.zeros(self.out_channels, 1, *self.kernel_size))

    def forward(self, input: Tensor) -> Tensor:
        return self._bordered(self, input)


class BorderConv2d(_BorderConv, nn.Conv2d):
    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.border = nn.Parameter(torch.zeros(self.out_channels, 1, *self.kernel_size))

    def forward(self, input: Tensor) -> Tensor:
        return self._bordered(self, input)


class BorderSameConv2d(_BorderConv, SameConv2d):
    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.border = nn.Parameter(torch.zeros(self.out_channels, 1, *self.kernel_size))

    def forward(self, input: Tensor) -> Tensor:
        return self._bordered(self, input)


class BorderConv3d(_BorderConv, nn.Conv3d):
    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.border = nn.Parameter(torch.zeros(self.out_channels, 1, *self.kernel_size))

    def forward(self, input: Tensor) -> Tensor:
        return self._bordered(self, input)


class BorderSameConv3d(_BorderConv, SameConv3d):
    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.border = nn.Parameter(torch.zeros(self.out_channels, 1, *self.kernel_size))

    def forward(self, input: Tensor) -> Tensor:
        return self._bordered(self, input)


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
        return input.new_ones(*input.shape[:-1], self.width)

    def extra_repr(self) -> str:
        return str(self.width)
