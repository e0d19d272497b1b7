"""Activations that a collapsed model may contain: on some channels only, or a function that was called in a forward."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from linearize.errors import CheckpointError
from linearize.gating.gate import out_of_place
from linearize.graph.ops import ACTIVATIONS
from linearize.purity import is_torch
from linearize.surgery.slices import part, rest_from


class PartialActivation(nn.Module):
    """An activation on the first `keep` channels of `axis` (counted from the end); the others pass.

    With `inplace`, for an activation that worked in place where it stood, it overwrites its input where nothing records
    or traces it.

    Examples:
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
        """The activation on the first K channels; the others pass. The same shape."""
        if not torch.jit.is_scripting():  # type: ignore[attr-defined]
            if self.inplace and _unrecorded(input):
                kept = part(input, self.axis, 0, self.keep)
                kept.copy_(self.activation(kept))
                return input
        kept, carried = part(input, self.axis, 0, self.keep), rest_from(input, self.axis, self.keep)
        return torch.cat((self.activation(kept), carried), dim=self.axis)

    def extra_repr(self) -> str:
        """What stays, and the axis, for the printed model."""
        return f"keep={self.keep}, axis={self.axis}" + (", inplace=True" if self.inplace else "")


def _unrecorded(x: Tensor) -> bool:
    """True in plain evaluation: no gradients are recorded, and no tracer of any kind looks on."""
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
    return type(x) is Tensor and not torch.is_grad_enabled() and not traced


class _BesideLines(nn.Module):
    """An activation, and a line `slope * x + intercept` for each channel."""

    if TYPE_CHECKING:  # TorchScript reads annotations, and knows none that are texts
        slope: Tensor
        intercept: Tensor

    def __init__(self, activation: nn.Module, channels: int, axis: int) -> None:
        super().__init__()
        self.activation = out_of_place(activation)
        self.axis = axis
        self.sizes = [-1] + [1] * (-1 - axis)
        self.register_buffer("slope", torch.ones(channels))
        self.register_buffer("intercept", torch.zeros(channels))

    def extra_repr(self) -> str:
        return f"channels={self.slope.numel()}, axis={self.axis}"


class MaskedActivation(_BesideLines):
    """An activation where `linear` is False, and `slope * x + intercept` where it is True: a gate made permanent.

    It stands where linear channels cannot be collapsed into their neighbours.

    Examples:
        >>> layer = MaskedActivation(nn.ReLU(), channels=2, axis=-1)
        >>> layer.linear[1] = True
        >>> layer(torch.tensor([-1.0, -2.0])).tolist()
        [0.0, -2.0]
    """

    if TYPE_CHECKING:
        linear: Tensor

    def __init__(self, activation: nn.Module, channels: int, axis: int) -> None:
        super().__init__(activation, channels, axis)
        self.register_buffer("linear", torch.zeros(channels, dtype=torch.bool))

    def forward(self, input: Tensor) -> Tensor:
        """The activation, or the line of each linear channel. The same shape."""
        y = self.activation(input)
        slope, intercept = (self.slope.view(self.sizes), self.intercept.view(self.sizes))
        line = slope.to(input.dtype) * input + intercept.to(input.dtype)
        return torch.where(self.linear.view(self.sizes), line.to(y.dtype), y)


class BlendedActivation(_BesideLines):
    """`h + alpha * (slope * x + intercept - h)` with `h = activation(x)` and one `alpha` per channel, for good.

    What is left of a gate whose channels stopped on their way to a line.

    Examples:
        >>> layer = BlendedActivation(nn.ReLU(), channels=2, axis=-1)
        >>> layer.alpha[1] = 0.25
        >>> layer(torch.tensor([-1.0, -1.0])).tolist()
        [0.0, -0.25]
    """

    if TYPE_CHECKING:
        alpha: Tensor

    def __init__(self, activation: nn.Module, channels: int, axis: int) -> None:
        super().__init__(activation, channels, axis)
        self.register_buffer("alpha", torch.zeros(channels))

    def forward(self, input: Tensor) -> Tensor:
        """The blend of activation and line of each channel. The same shape."""
        y = self.activation(input)
        of_y = (1 - self.alpha).view(self.sizes)
        of_x = (self.alpha * self.slope).view(self.sizes)
        of_one = (self.alpha * self.intercept).view(self.sizes)
        return torch.addcmul(torch.addcmul(of_one, of_x, input), of_y, y).to(y.dtype)


class FoldedNorm(nn.Module):
    """Replaces a batch norm that was folded into the layer before it. It does nothing, or adds the bias that was left.

    Its numbers are those of a batch norm that does this, for code that folds norms (`linearize.surgery.fusing`).

    Examples:
        >>> layer = FoldedNorm(channels=2, axis=-1)
        >>> layer(torch.ones(1, 2)).tolist(), layer.running_var.tolist(), layer.eps
        ([[1.0, 1.0]], [1.0, 1.0], 0.0)
    """

    eps = 0.0
    momentum = 0.1
    affine = True
    track_running_stats = True

    def __init__(self, channels: int, axis: int, shift: bool = False) -> None:
        super().__init__()
        self.num_features, self.axis, self.shift = channels, axis, shift
        self.sizes = [-1] + [1] * (-1 - axis)
        for name, value in (("weight", 1.0), ("running_mean", 0.0), ("running_var", 1.0)):
            self.register_buffer(name, torch.full((channels,), value), persistent=False)
        if shift:
            self.bias = nn.Parameter(torch.zeros(channels))
        else:
            self.register_buffer("bias", torch.zeros(channels), persistent=False)

    def forward(self, input: Tensor) -> Tensor:
        """The input, plus the bias that was left, if there is one."""
        return input + self.bias.view(self.sizes) if self.shift else input

    def extra_repr(self) -> str:
        """Channels and axis, for the printed model."""
        return f"{self.num_features}, axis={self.axis}" + (", shift=True" if self.shift else "")


class Elementwise(nn.Module):
    """An activation function of ATen as a module. It replaces a call inside a forward.

    Examples:
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
        """The function of each element. The same shape."""
        out: Tensor = getattr(torch.ops.aten, self.function)(input, **self.options)
        return out

    def extra_repr(self) -> str:
        """The function and its options, for the printed model."""
        return ", ".join([self.function, *(f"{name}={value}" for name, value in self.options.items())])


def pick(layer: nn.Module, expected: nn.Module | str, callee: Any) -> Any:
    """`layer`, if `callee` is the module or torch function that it replaces; else `callee`.

    A forward with `self.acts[self.kind](x)` may call something else later.

    Examples:
        >>> gate = nn.Identity()
        >>> pick(gate, "relu", torch.relu) is gate, pick(gate, "relu", torch.tanh) is torch.tanh
        (True, True)
    """
    if isinstance(expected, str):
        return layer if is_torch(callee) and callee.__name__.strip("_") == expected else callee
    return layer if callee is expected else callee


def activate(layer: nn.Module, input: Tensor, **arguments: Any) -> Tensor:
    """Call the replacement of an activation function, with the arguments of the present call.

    A forward that says `F.leaky_relu(x, self.slope)` reads the slope at each call.

    Examples:
        >>> activate(Elementwise("leaky_relu", {"negative_slope": 0.1}), torch.tensor([-1.0]), negative_slope=0.5)
        tensor([-0.5000])
    """
    if isinstance(layer, Elementwise):
        layer.options = {**layer.options, **arguments}
    for module in layer.modules():
        for name, child in module._modules.items():
            if isinstance(child, Elementwise) and any(child.options.get(n) != v for n, v in arguments.items()):
                # A new one: what has run already may be run again on its way back, with what it was told then.
                module._modules[name] = Elementwise(child.function, {**child.options, **arguments})
    out: Tensor = layer(input)
    return out
