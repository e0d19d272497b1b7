"""Linear maps that a collapsed model may contain besides torch's own. They carry the merged term past the activation.

They allow the forward code around a site to stay unchanged. Each is a module around an ordinary `nn.Linear` or
`nn.Conv1d`, `2d`, `3d` of the real width, with slices, concatenations and additions beside it. They contain only what
tracers, exporters and quantisers know, and no branch on tensor values. Shape letters: K channels that stay nonlinear,
O output features, I input features. Convolutions hold their number of spatial dimensions in `dims`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from linearize.algebra.affine import pad_same
from linearize.errors import UsageError
from linearize.surgery.slices import every, ones_beside, part

fx.wrap("ones_beside")  # leaves of symbolic tracing, as torch's own functions are
fx.wrap("pad_same")

_CONVS: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


_GEOMETRY = {"stride", "padding", "dilation", "groups", "kernel_size", "padding_mode", "out_channels", "out_features"}


class Around(nn.Module):
    """A module around an ordinary layer, whose weight, bias and geometry can be read as its own.

    Forward code may look at them (transformers asks for the dtype of `self.wo.weight`).

    Raises:
        UsageError: somebody sets its weight or bias, as code that folds norms does.
    """

    weight_of_child = True  # see `tensors.is_computed`
    __jit_unused_properties__ = ("weight", "bias", "inner", "start", "in_channels", "in_features")

    @property
    def weight(self) -> Any:
        """The weight of the layer inside."""
        return self.inner.weight

    @property
    def bias(self) -> Any:
        """The bias of the layer inside; None if it has none."""
        return self.inner.bias

    @property
    def inner(self) -> Any:
        """The layer inside."""
        return self._modules["linear" if "linear" in self._modules else "conv"]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name) if name in _GEOMETRY else super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in {"weight", "bias"}:
            found = f"does more than a linear map of its {name}, which cannot be set from outside"
            remedy = "Fuse or re-parameterise the model before linearize.convert, or set it on the layer inside."
            raise UsageError(type(self).__name__, found, remedy)
        super().__setattr__(name, value)


class AroundLinear(Around):
    """A module around a matrix."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__()
        self.linear = nn.Linear(in_features, out_features, bias)


class AroundConv(Around):
    """A module around a convolution."""

    def __init__(self, dims: int, **geometry: Any) -> None:
        super().__init__()
        self.dims = dims
        self.conv = _CONVS[dims](**geometry)


class _Carry(Around):
    """A consumer of a site that carries its output.

    Attributes:
        keep: K, the features that its own map reads.
        first, last: the carried features that are its own.
        whole: `weight` is that of the ordinary layer that computes the same, for code that folds norms.
    """

    def _place(self, start: int, whole: bool) -> None:
        outputs, self.keep = self.inner.weight.shape[:2]
        self.first, self.last = self.keep + start, self.keep + start + outputs
        self.whole = whole

    @property
    def start(self) -> int:
        """The index at which its part of the carried features starts."""
        return int(self.first - self.keep)

    @property
    def weight(self) -> Any:
        """The weight of the layer inside; or (O, all inputs), with ones for the carried features."""
        own: Tensor = self.inner.weight
        if not self.whole:
            return own
        passed = torch.eye(len(own), self.last - self.keep, dtype=own.dtype, device=own.device).roll(self.start, 1)
        return torch.cat((own, passed.view(*passed.shape, *own.shape[2:])), dim=1)

    @property
    def in_features(self) -> int:
        """Width of the input, as far as it reads."""
        return int(self.last)

    in_channels = in_features


class CarryLinear(_Carry, AroundLinear):
    """Consumer of a site that carries its output: `weight @ h[:K] + bias + h[K + start : K + start + O]`."""

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, start: int = 0, whole: bool = False
    ) -> None:
        super().__init__(in_features, out_features, bias)
        self._place(start, whole)

    def forward(self, input: Tensor) -> Tensor:
        """The matrix on the first K features, plus its part of the carried ones: (..., K + carried) to (..., O)."""
        out: Tensor = self.linear(input[..., : self.keep]) + input[..., self.first : self.last]
        return out


class CarryConv(_Carry, AroundConv):
    """Consumer of a site that carries its output, as a pointwise convolution."""

    def __init__(self, dims: int, start: int = 0, whole: bool = False, **geometry: Any) -> None:
        super().__init__(dims, **geometry)
        self._place(start, whole)
        self.axis = -1 - dims
        self.steps = list(self.conv.stride)

    def forward(self, input: Tensor) -> Tensor:
        """The convolution on the first K channels, plus its part of the carried ones."""
        carried = every(part(input, self.axis, self.first, self.last), self.steps)
        out: Tensor = self.conv(part(input, self.axis, 0, self.keep)) + carried
        return out


class InputCarryConv(AroundConv):
    """Producer of a site that carries its input: its own output, then the input, then `ones` channels of ones."""

    def __init__(self, dims: int, ones: int = 0, **geometry: Any) -> None:
        super().__init__(dims, **geometry)
        self.ones = ones
        self.axis = -1 - dims
        self.steps = list(self.conv.stride)

    def forward(self, input: Tensor) -> Tensor:
        """The convolution of the input, then the input itself, then channels of ones."""
        carried = every(input, self.steps)
        parts = [self.conv(input), carried]
        if self.ones > 0:
            parts.append(torch.ones_like(part(carried, self.axis, 0, self.ones)))
        return torch.cat(parts, dim=self.axis)


class SameConv(AroundConv):
    """A convolution that pads by the "SAME" rule: as many outputs as inputs, divided by the stride and rounded up."""

    def __init__(self, dims: int, **geometry: Any) -> None:
        super().__init__(dims, **geometry)
        self.kernel, self.steps, self.spread = map(list, (self.conv.kernel_size, self.conv.stride, self.conv.dilation))

    def forward(self, input: Tensor) -> Tensor:
        """The convolution of the padded input."""
        out: Tensor = self.conv(pad_same(input, self.kernel, self.steps, self.spread))
        return out


class BorderConv(AroundConv):
    """A convolution whose bias came through zero padding: near the border only a part of it holds.

    `border` is a convolution of one channel of ones, padded with zeros like every other channel. It holds the bias.
    """

    def __init__(self, dims: int, bias: bool = True, **geometry: Any) -> None:
        super().__init__(dims, **geometry, bias=False)
        self.border = _CONVS[dims](**{**geometry, "in_channels": 1}, bias=bias)
        self.axis = -1 - dims

    @property
    def bias(self) -> Any:
        """The bias of the border's convolution."""
        return self.border.bias

    def padded(self, input: Tensor) -> Tensor:
        """The padded input of both convolutions."""
        return input

    def forward(self, input: Tensor) -> Tensor:
        """The convolution of the padded input, plus what is left of the bias near the border."""
        sizes = [1, 1]
        for axis in range(self.axis + 1, 0):
            sizes.append(input.shape[axis])  # noqa: PERF401 - what TorchScript understands
        border = self.border(self.padded(input.new_ones(sizes)))
        out: Tensor = self.conv(self.padded(input)) + border.flatten(0, 1)
        return out


class BorderSameConv(BorderConv):
    """A convolution with a border and with padding by the "SAME" rule."""

    def __init__(self, dims: int, bias: bool = True, **geometry: Any) -> None:
        super().__init__(dims, bias, **geometry)
        self.kernel, self.steps, self.spread = map(list, (self.conv.kernel_size, self.conv.stride, self.conv.dilation))

    def padded(self, input: Tensor) -> Tensor:
        """The input, padded by the "SAME" rule."""
        return pad_same(input, self.kernel, self.steps, self.spread)


class OnesLinear(AroundLinear):
    """A linear map with `ones` features of ones put in at `at`: the gate factor of carried channels in a gated unit."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True, at: int = 0, ones: int = 0) -> None:
        super().__init__(in_features, out_features, bias)
        self.at = at
        self.ones = ones

    def forward(self, input: Tensor) -> Tensor:
        """The matrix, with features of ones put in: (..., I) to (..., O + ones)."""
        y = self.linear(input)
        before = functional.pad(y[..., : self.at], [0, self.ones], value=1.0)
        return torch.cat((before, y[..., self.at :]), dim=-1)


class Ones(nn.Module):
    """`width` features of ones for any input: the gate factor of a gated unit whose channels are all linear."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, input: Tensor) -> Tensor:
        """Features of ones beside any input: (..., any) to (..., width)."""
        return ones_beside(input, self.width)

    def extra_repr(self) -> str:
        """The width, for the printed model."""
        return str(self.width)


def roles_of(layer: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """For each of "weight", "bias" and "border" of a linear layer: (module, name of the parameter).

    Examples:
        >>> sorted(roles_of(CarryLinear(2, 3))), sorted(roles_of(nn.Linear(2, 3, bias=False)))
        (['bias', 'weight'], ['weight'])
    """
    inner = layer.inner if isinstance(layer, Around) else layer
    found = {name: (inner, name) for name, held in inner._parameters.items() if held is not None}
    if isinstance(layer, BorderConv):
        border = {"weight": "border", "bias": "bias"}
        found |= {border[name]: (layer.border, name) for name, p in layer.border._parameters.items() if p is not None}
    return found
