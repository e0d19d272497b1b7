"""Activations that a collapsed model may contain: on some channels only, or a function that was called in a forward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from linearize.errors import CheckpointError
from linearize.gate import out_of_place
from linearize.graph.ops import ACTIVATIONS
from linearize.purity import is_torch


class PartialActivation(nn.Module):
    """An activation on the first `keep` channels of `axis` (counted from the end); the others pass.

    With `inplace`, as in torch's own activations, it may overwrite its input instead of copying the channels that pass.
    It does so only where no gradients are recorded.

    Example:
        >>> PartialActivation(nn.ReLU(), keep=1, axis=-1)(torch.tensor([-1.0, -2.0])).tolist()
        [0.0, -2.0]
    """

    def __init__(self, activation: nn.Module, keep: int, axis: int, inplace: bool = False) -> None:
        super().__init__()
        self.activation = out_of_place(activation)
        self.keep = keep
        self.axis = axis
        self.inplace = inplace

    def forward(self, input: Tensor) -> Tensor:
        kept, carried = input.split((self.keep, input.shape[self.axis] - self.keep), dim=self.axis)
        y: Tensor = self.activation(kept)
        if self.inplace and type(input) is Tensor and not torch.is_grad_enabled() and not torch.compiler.is_compiling():
            kept.copy_(y)
            return input
        return torch.cat((y, carried), dim=self.axis)

    def extra_repr(self) -> str:
        return f"keep={self.keep}, axis={self.axis}" + (", inplace=True" if self.inplace else "")


class _BesideLines(nn.Module):
    """An activation, and a line `slope * x + intercept` for each channel."""

    slope: Tensor
    intercept: Tensor

    def __init__(self, activation: nn.Module, channels: int, axis: int) -> None:
        super().__init__()
        self.activation = out_of_place(activation)
        self.axis = axis
        self.register_buffer("slope", torch.ones(channels))
        self.register_buffer("intercept", torch.zeros(channels))

    def extra_repr(self) -> str:
        return f"channels={self.slope.numel()}, axis={self.axis}"


class MaskedActivation(_BesideLines):
    """An activation where `linear` is False, and `slope * x + intercept` where it is True: a gate made permanent.

    It stands where linear channels cannot be collapsed into their neighbours.

    Example:
        >>> layer = MaskedActivation(nn.ReLU(), channels=2, axis=-1)
        >>> layer.linear[1] = True
        >>> layer(torch.tensor([-1.0, -2.0])).tolist()
        [0.0, -2.0]
    """

    linear: Tensor

    def __init__(self, activation: nn.Module, channels: int, axis: int) -> None:
        super().__init__(activation, channels, axis)
        self.register_buffer("linear", torch.zeros(channels, dtype=torch.bool))

    def forward(self, input: Tensor) -> Tensor:
        x, y = input, self.activation(input)
        sizes = (-1, *(1,) * (-1 - self.axis))
        line = self.slope.view(sizes).to(x.dtype) * x + self.intercept.view(sizes).to(x.dtype)
        out: Tensor = torch.where(self.linear.view(sizes), line.to(y.dtype), y)
        return out


class BlendedActivation(_BesideLines):
    """`h + alpha * (slope * x + intercept - h)` with `h = activation(x)` and one `alpha` per channel, for good.

    What is left of a gate whose channels stopped on their way to a line.

    Example:
        >>> layer = BlendedActivation(nn.ReLU(), channels=2, axis=-1)
        >>> layer.alpha[1] = 0.25
        >>> layer(torch.tensor([-1.0, -1.0])).tolist()
        [0.0, -0.25]
    """

    alpha: Tensor

    def __init__(self, activation: nn.Module, channels: int, axis: int) -> None:
        super().__init__(activation, channels, axis)
        self.register_buffer("alpha", torch.zeros(channels))

    def forward(self, input: Tensor) -> Tensor:
        x, y = input, self.activation(input)
        sizes = (-1, *(1,) * (-1 - self.axis))
        of_y, of_x, of_one = (
            value.view(sizes) for value in (1 - self.alpha, self.alpha * self.slope, self.alpha * self.intercept)
        )
        out: Tensor = torch.addcmul(torch.addcmul(of_one, of_x, x), of_y, y)
        return out.to(y.dtype)


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


def pick(layer: nn.Module, expected: nn.Module | str, callee: Any) -> Any:
    """`layer`, as long as `callee` is the module, or the torch function of the name, that it stands in for.

    A forward that says `self.acts[self.kind](x)` may call something else one day.

    Example:
        >>> gate = nn.Identity()
        >>> pick(gate, "relu", torch.relu) is gate, pick(gate, "relu", torch.tanh) is torch.tanh
        (True, True)
    """
    if isinstance(expected, str):
        return layer if is_torch(callee) and callee.__name__.strip("_") == expected else callee
    return layer if callee is expected else callee


def activate(layer: nn.Module, input: Tensor, **arguments: Any) -> Tensor:
    """Call what stands in for an activation function, with the arguments that the function would get now.

    A forward that says `F.leaky_relu(x, self.slope)` reads the slope at each call.

    Example:
        >>> activate(Elementwise("leaky_relu", {"negative_slope": 0.1}), torch.tensor([-1.0]), negative_slope=0.5)
        tensor([-0.5000])
    """
    if isinstance(layer, Elementwise):
        layer.options = {**layer.options, **arguments}
    for part in layer.modules():
        for name, child in part._modules.items():
            if isinstance(child, Elementwise) and any(child.options.get(n) != v for n, v in arguments.items()):
                # A new one: what has run already may be run again on its way back, with what it was told then.
                part._modules[name] = Elementwise(child.function, {**child.options, **arguments})
    out: Tensor = layer(input)
    return out
