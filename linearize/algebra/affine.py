"""Affine maps and their products, in float64: matrices and convolutions alike.

Shape letters: O outputs, I inputs, C hidden channels, k the spatial kernel (empty for a matrix).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

Sizes = tuple[int, ...]


@dataclass(frozen=True)
class Affine:
    """`y = weight * x + bias`, as a matrix or a convolution with zero padding and dense channels.

    Attributes:
        weight: (O, I, *k).
        bias: (O,).
        stride, padding, dilation: one number per spatial dimension; empty for a matrix.
        same: pad besides, by TensorFlow's "SAME" rule, so that the output has ceil(size / stride) positions.
        groups: O for a depthwise map, whose weight is then (O, 1, *k); it is written as it is, and never composed.
    """

    weight: Tensor
    bias: Tensor
    stride: Sizes = ()
    padding: Sizes = ()
    dilation: Sizes = ()
    same: bool = False
    groups: int = 1

    @property
    def dims(self) -> int:
        """Spatial dimensions."""
        return self.weight.dim() - 2

    @property
    def kernel(self) -> Sizes:
        """Size of the spatial kernel."""
        return tuple(self.weight.shape[2:])

    @property
    def pointwise(self) -> bool:
        """True if it looks at one position at a time and does not pad: a matrix, or a 1x1 convolution."""
        return math.prod(self.kernel) == 1 and not self.padded

    @property
    def padded(self) -> bool:
        """True if it looks at zeros beyond the border."""
        return self.same or any(self.padding)

    @property
    def strided(self) -> bool:
        """True if it skips positions."""
        return any(step != 1 for step in self.stride)

    @property
    def plain(self) -> bool:
        """True if it is a matrix at every position, and so the same map in any number of dimensions."""
        return self.pointwise and not self.strided


def dense(weight: Tensor, groups: int) -> Tensor:
    """The weight (O, I, *k) of an ungrouped convolution that equals a grouped one with weight (O, I / groups, *k).

    Examples:
        >>> dense(torch.ones(2, 1), groups=2).tolist()
        [[1.0, 0.0], [0.0, 1.0]]
    """
    if groups == 1:
        return weight
    outputs, inputs = weight.shape[0] // groups, weight.shape[1]
    full = weight.new_zeros(weight.shape[0], inputs * groups, *weight.shape[2:])
    for group in range(groups):
        rows = slice(group * outputs, (group + 1) * outputs)
        full[rows, group * inputs : (group + 1) * inputs] = weight[rows]
    return full


def rows(affine: Affine, index: Tensor) -> Affine:
    """Only some outputs of the map."""
    return replace(affine, weight=affine.weight[index], bias=affine.bias[index])


def columns(affine: Affine, index: Tensor) -> Affine:
    """Only some inputs of the map; the bias stays."""
    return replace(affine, weight=affine.weight[:, index])


def scaled(affine: Affine, scale: Tensor, shift: Tensor) -> Affine:
    """`scale * affine(x) + shift`, one number per output."""
    weight = affine.weight * scale.view(-1, *(1,) * (affine.weight.dim() - 1))
    return replace(affine, weight=weight, bias=affine.bias * scale + shift)


def behind(affine: Affine, first: int, scale: Tensor, shift: Tensor) -> Affine:
    """The map of `x`, from the map of `scale * x + shift`. Scale and shift belong to the inputs from `first` on.

    The shift must reach every position alike: there is no padding in between.

    Examples:
        >>> outer = Affine(torch.ones(1, 3), torch.zeros(1))
        >>> found = behind(outer, 1, torch.tensor([2.0]), torch.tensor([5.0]))
        >>> found.weight.tolist(), found.bias.tolist()
        ([[1.0, 2.0, 1.0]], [5.0])
    """
    weight, inputs = affine.weight.clone(), slice(first, first + scale.numel())
    part = affine.weight[:, inputs]
    total = part.flatten(2).sum(2) if affine.dims else part
    weight[:, inputs] = part * scale.view(1, -1, *(1,) * affine.dims)
    return replace(affine, weight=weight, bias=affine.bias + total @ shift)


def stacked(first: Affine, second: Affine) -> Affine:
    """Two maps of the same input as one map, with the outputs of both. Their geometry must be the same."""
    return replace(first, weight=torch.cat((first.weight, second.weight)), bias=torch.cat((first.bias, second.bias)))


def as_dims(affine: Affine, dims: int) -> Affine:
    """A pointwise map as a 1x1 convolution of `dims` dimensions, or as a matrix for `dims` = 0."""
    if affine.dims == dims:
        return affine
    ones = (1,) * dims
    weight = affine.weight.reshape(*affine.weight.shape[:2], *ones)
    return Affine(weight, affine.bias, ones, (0,) * dims, ones)


def obstacle(outer: Affine, inner: Affine) -> str | None:
    """The reason why `outer(inner(x))` is not a single convolution; None if it is one.

    A k x k map after a k' x k' one is exact only without padding in between. Behind a pointwise map padding is
    harmless, if the bias is treated right (see `border_kernel`).
    """
    if outer.padded and not inner.pointwise:
        return "zero padding between two spatial convolutions"
    if (outer.same and inner.strided) or (inner.same and outer.strided):
        return "padding that depends on the size, and a stride"
    if outer.dims != inner.dims and not outer.plain and not inner.plain:
        return "maps over different numbers of dimensions"
    return None


def compose(outer: Affine, inner: Affine) -> Affine:
    """`outer(inner(x))` as one map. The caller asks `obstacle` first.

    The bias is that of the interior. Where `outer` pads and `inner` has a bias, the border differs: `border_kernel`.
    """
    dims = outer.dims if not outer.plain else inner.dims if not inner.plain else max(outer.dims, inner.dims)
    outer, inner = as_dims(outer, dims), as_dims(inner, dims)
    bias = outer.weight.flatten(2).sum(2) @ inner.bias + outer.bias if dims else outer.weight @ inner.bias + outer.bias
    if dims == 0:
        return Affine(outer.weight @ inner.weight, bias)
    weight, dilation = _convolved(outer, inner)
    stride = tuple(a * b for a, b in zip(outer.stride, inner.stride, strict=True))
    padding = tuple(p + s * q for p, s, q in zip(inner.padding, inner.stride, outer.padding, strict=True))
    return Affine(weight, bias, stride, padding, dilation, outer.same or inner.same)


def _convolved(outer: Affine, inner: Affine) -> tuple[Tensor, Sizes]:
    """The kernel of the product, and its dilation: steps of `outer` count inner strides."""
    if inner.pointwise and not any(s > 1 and k > 1 for s, k in zip(inner.stride, outer.kernel, strict=True)):
        matrix = inner.weight.flatten(1)
        return torch.einsum("oc...,ci->oi...", outer.weight, matrix), outer.dilation
    if math.prod(outer.kernel) == 1:
        return torch.einsum("oc,ci...->oi...", outer.weight.flatten(1), inner.weight), inner.dilation
    steps = tuple(d * s for d, s in zip(outer.dilation, inner.stride, strict=True))
    common = tuple(
        math.gcd(a if k > 1 else 0, b if q > 1 else 0) or 1
        for a, k, b, q in zip(steps, outer.kernel, inner.dilation, inner.kernel, strict=True)
    )
    a = _spread(
        outer.weight, tuple(s // c if k > 1 else 1 for s, c, k in zip(steps, common, outer.kernel, strict=True))
    )
    b = _spread(
        inner.weight,
        tuple(d // c if k > 1 else 1 for d, c, k in zip(inner.dilation, common, inner.kernel, strict=True)),
    )
    if a.shape[1] == 0:  # nothing passes: convolutions refuse to work on no channels
        sizes = (p + q - 1 for p, q in zip(a.shape[2:], b.shape[2:], strict=True))
        return a.new_zeros(a.shape[0], b.shape[1], *sizes), common
    transposed = (functional.conv_transpose1d, functional.conv_transpose2d, functional.conv_transpose3d)[outer.dims - 1]
    return transposed(a, b), common


def _spread(weight: Tensor, steps: Sizes) -> Tensor:
    """A kernel with its taps `steps` apart and zeros in between."""
    if all(step == 1 for step in steps):
        return weight
    sizes = tuple((k - 1) * s + 1 for k, s in zip(weight.shape[2:], steps, strict=True))
    full = weight.new_zeros(*weight.shape[:2], *sizes)
    full[(slice(None), slice(None), *(slice(None, None, s) for s in steps))] = weight
    return full


def border_kernel(outer: Affine, inner_bias: Tensor) -> Tensor:
    """Kernel (O, 1, *k) of an input channel of ones, which replaces the inner bias.

    Padded with zeros like every other channel, it makes the bias exact at the border.
    """
    return torch.einsum("oc...,c->o...", outer.weight, inner_bias).unsqueeze(1)


def same_padding(sizes: list[int], kernel: list[int], stride: list[int], dilation: list[int]) -> list[int]:
    """Padding for `functional.pad` by the "SAME" rule: an odd remainder goes to the end. Last dimension first.

    Lists, and plain loops, so that TorchScript takes it.

    Examples:
        >>> same_padding([5, 4], [3, 3], [1, 2], [1, 1])
        [0, 1, 1, 1]
    """
    padding: list[int] = []
    for i in range(len(kernel) - 1, -1, -1):
        steps = (sizes[i] + stride[i] - 1) // stride[i] - 1
        total = max(steps * stride[i] + (kernel[i] - 1) * dilation[i] + 1 - sizes[i], 0)
        padding.append(total // 2)
        padding.append(total - total // 2)
    return padding


def pad_same(x: Tensor, kernel: list[int], stride: list[int], dilation: list[int]) -> Tensor:
    """Zero padding by the "SAME" rule.

    Examples:
        >>> pad_same(torch.ones(1, 4), [3], [2], [1]).tolist()
        [[1.0, 1.0, 1.0, 1.0, 0.0]]
    """
    sizes = [x.size(x.dim() - len(kernel) + i) for i in range(len(kernel))]
    return functional.pad(x, same_padding(sizes, kernel, stride, dilation))


def apply(affine: Affine, x: Tensor) -> Tensor:
    """The value of the map: of a matrix on the last axis, of a convolution on (batch, I, *sizes)."""
    if affine.dims == 0:
        return functional.linear(x, affine.weight, affine.bias)
    if affine.same:
        x = pad_same(x, list(affine.kernel), list(affine.stride), list(affine.dilation))
    function = (functional.conv1d, functional.conv2d, functional.conv3d)[affine.dims - 1]
    return function(x, affine.weight, affine.bias, affine.stride, affine.padding, affine.dilation)


def norm_scale_shift(
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    eps: float,
    channels: int,
) -> tuple[Tensor, Tensor]:
    """Scale and shift of `weight * (x - mean) / sqrt(var + eps) + bias`, in float64.

    Examples:
        >>> scale, shift = norm_scale_shift(None, None, torch.ones(1), torch.tensor([3.0]), 1.0, 1)
        >>> scale.item(), shift.item()
        (0.5, -0.5)
    """
    held = next((t for t in (weight, bias, mean, var) if t is not None), torch.zeros(()))
    ones = torch.ones(channels, dtype=torch.float64, device=held.device)
    scale = ones if weight is None else weight.double().reshape(-1).expand(channels)
    if var is not None:
        scale = scale / torch.sqrt(var.double() + eps)
    shift = torch.zeros_like(ones) if bias is None else bias.double().reshape(-1)
    return scale, shift if mean is None else shift - mean.double() * scale
