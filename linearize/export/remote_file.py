"""What a generated modelling file is made of: a few layers, and the function that puts them in by a plan of plain data.

The source of what a model needs is copied from here, so that all of it is read by people, typed and tested. Nothing in
this file may need linearize. Shape letters: K channels that stay nonlinear, O outputs of a layer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


class Around(nn.Module):
    """A module around an ordinary matrix, whose weight and bias can be read as its own."""

    def __init__(self, in_features: int, out_features: int, *, bias: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(in_features, out_features, bias)

    @property
    def weight(self) -> Tensor:
        """The weight of the linear layer inside."""
        return self.linear.weight

    @property
    def bias(self) -> Tensor | None:
        """The bias of the linear layer inside."""
        return self.linear.bias


class CarryLinear(Around):
    """The matrix on the first K features, plus O of those behind them, which were carried past the activation."""

    def __init__(self, in_features: int, out_features: int, *, bias: bool, start: int = 0) -> None:
        super().__init__(in_features, out_features, bias=bias)
        self.keep, self.first = in_features, in_features + start
        self.last = self.first + out_features

    def forward(self, x: Tensor) -> Tensor:
        """(..., K + carried) to (..., O)."""
        out: Tensor = self.linear(x[..., : self.keep]) + x[..., self.first : self.last]
        return out


class OnesLinear(Around):
    """The matrix, with so many features of ones put in at a place: the gate of channels that have none."""

    def __init__(self, in_features: int, out_features: int, *, bias: bool, at: int, ones: int) -> None:
        super().__init__(in_features, out_features, bias=bias)
        self.at, self.ones = at, ones

    def forward(self, x: Tensor) -> Tensor:
        """(..., I) to (..., O + ones)."""
        y = self.linear(x)
        before = functional.pad(y[..., : self.at], [0, self.ones], value=1.0)
        return torch.cat((before, y[..., self.at :]), dim=-1)


class OnlyLinear(Around):
    """The matrix in the place of a module that is given more than one argument: the first of them alone counts."""

    def __init__(
        self, in_features: int, out_features: int, *, bias: bool, keyword: str, nones: int, caches: bool = False
    ) -> None:
        super().__init__(in_features, out_features, bias=bias)
        self.keyword, self.nones, self.caches = keyword, nones, caches

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The product, and None for each further result of the module that stood here."""
        plain = (Tensor, type(None), bool, int, float, str, tuple, list, dict)
        if not self.caches and not all(isinstance(value, plain) for value in (*args, *kwargs.values())):
            raise ValueError("a cache of keys and values would stay empty here: pass use_cache=False")
        out = self.linear(args[0] if args else kwargs[self.keyword])
        return (out, *(None,) * self.nones) if self.nones else out


class Ones(nn.Module):
    """So many features of ones, whatever the input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, x: Tensor) -> Tensor:
        """(..., any) to (..., width)."""
        return functional.pad(x[..., :0], [0, self.width], value=1.0)


class PartialActivation(nn.Module):
    """The activation that stood here on the first K channels of an axis; the others pass."""

    def __init__(self, activation: nn.Module, keep: int, axis: int) -> None:
        super().__init__()
        self.activation, self.keep, self.axis = activation, keep, axis

    def forward(self, x: Tensor) -> Tensor:
        """The same shape."""
        first, rest = x.split([self.keep, x.shape[self.axis] - self.keep], self.axis)
        return torch.cat((self.activation(first), rest), dim=self.axis)


class MaskedActivation(nn.Module):
    """The activation that stood here, but for channels of an axis that have a line in its place."""

    slope: Tensor
    intercept: Tensor
    linear: Tensor

    def __init__(self, activation: nn.Module, channels: int, axis: int) -> None:
        super().__init__()
        self.activation, self.sizes = activation, [-1] + [1] * (-1 - axis)
        for name, kind in (("slope", torch.float32), ("intercept", torch.float32), ("linear", torch.bool)):
            self.register_buffer(name, torch.zeros(channels, dtype=kind))

    def forward(self, x: Tensor) -> Tensor:
        """The same shape."""
        slope, intercept, linear = (t.view(self.sizes) for t in (self.slope, self.intercept, self.linear))
        y: Tensor = self.activation(x)
        return torch.where(linear, (slope.to(x.dtype) * x + intercept.to(x.dtype)).to(y.dtype), y)


def identity(current: nn.Module) -> nn.Module:
    """Nothing, in the place of a layer whose weight somebody may ask for."""
    made = nn.Identity()
    for name in ("weight", "bias"):
        if name in current._parameters:
            made.register_parameter(name, None)
    return made


def build(entry: dict[str, Any], current: nn.Module) -> nn.Module:
    """The layer that an entry of the plan describes; `current` is what stands in its place."""
    options = {name: value for name, value in entry.items() if name not in ("path", "layer")}
    inner = [current] if entry["layer"] in WRAPPING else []
    made: nn.Module = LAYERS[entry["layer"]](*inner, **options)
    return made


def rebuild(model: nn.Module, plan: dict[str, Any]) -> None:
    """Put the layers of a plan into a model, and set the numbers that its modules keep."""
    for entry in plan["layers"]:
        parent, _, name = entry["path"].rpartition(".")
        setattr(model.get_submodule(parent), name, build(entry, model.get_submodule(entry["path"])))
    for path, name, value in plan["attributes"]:
        setattr(model.get_submodule(path), name, value)


LAYERS: dict[str, Any] = {
    "Linear": nn.Linear,
    "Conv1d": nn.Conv1d,
    "Conv2d": nn.Conv2d,
    "Conv3d": nn.Conv3d,
    "CarryLinear": CarryLinear,
    "OnesLinear": OnesLinear,
    "OnlyLinear": OnlyLinear,
    "Ones": Ones,
    "PartialActivation": PartialActivation,
    "MaskedActivation": MaskedActivation,
    "Identity": identity,
}
WRAPPING = ("PartialActivation", "MaskedActivation", "Identity")  # which are told what stood in their place
