"""What labels show about an output: the part that they belong to, and whether it holds classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from torch import Tensor

from linearize.nest import leaves_of

__all__ = ["OutputKind", "class_axes", "fitted", "labels_by_part"]

OutputKind = Literal["classes", "multilabel", "values"]


def class_axes(z: Tensor) -> tuple[int, ...]:
    """Where classes may be: last, or (B, K, ...) as in images, where that comes first."""
    if z.dim() < 1:
        return ()
    return (-1,) if z.dim() < 3 else (-1, 1) if z.dim() == 3 else (1, -1)


def fitted(z: Tensor, y: Tensor) -> tuple[OutputKind, int] | None:
    """The kind of an output with these targets, and its class axis; None if they do not fit.

    Whole numbers of the shape without one axis are classes, and so are rows of the output's own shape that are
    distributions. Zeros and ones of that shape are labels that exclude nothing, unless the output is in [0, 1] itself.
    Other targets of that shape are values.

    Examples:
        >>> import torch
        >>> fitted(torch.zeros(2, 5, 8, 8), torch.zeros(2, 8, 8, dtype=torch.long))
        ('classes', 1)
        >>> fitted(torch.zeros(2, 3, 8, 8), torch.rand(2, 3, 8, 8))
        ('values', -1)
    """
    shape = tuple(z.shape)
    if not y.is_floating_point() and not y.is_complex():
        for axis in class_axes(z):
            place = axis % z.dim()
            if shape[axis] > 1 and tuple(y.shape) == shape[:place] + shape[place + 1 :]:
                return "classes", axis
    if tuple(y.shape) != shape and (*y.shape, 1) != shape:
        return None
    y = y.detach().reshape(shape)
    if y.is_complex() or not y.numel():
        return "values", -1
    numbers = y.float()
    if bool((numbers >= 0).all()):
        for axis in class_axes(z):
            if shape[axis] > 1 and bool(((numbers.sum(axis) - 1).abs() < 1e-3).all()):
                return "classes", axis
    zeros, ones = numbers == 0, numbers == 1
    inside = bool(((z.detach() >= 0) & (z.detach() <= 1)).all())
    if bool((zeros | ones).all()) and bool(zeros.any()) and bool(ones.any()) and not inside:
        return "multilabel", -1
    return "values", -1


def labels_by_part(names: Sequence[str], tensors: Mapping[str, list[Tensor]], labels: Any) -> dict[str, Tensor]:
    """The labels of each part: those of the same path. A single tensor belongs to the logits, or the first that fits.

    A part of the same shape as that one, such as an auxiliary head, has the same meaning.
    """
    if labels is None:
        return {}
    if not isinstance(labels, Tensor):
        by_path = {name: value for name, value in leaves_of(labels) if isinstance(value, Tensor)}
        return {name: by_path[name] for name in names if name in by_path}
    ordered = sorted(names, key=lambda name: name.rsplit(".", 1)[-1] != "logits")
    fitting = (name for name in ordered if len(tensors[name]) == 1 and fitted(tensors[name][0], labels) is not None)
    main = next(fitting, None)
    if main is None:
        return {}
    shape = tensors[main][0].shape
    alike = [name for name in names if name != main and len(tensors[name]) == 1 and tensors[name][0].shape == shape]
    return dict.fromkeys([main, *alike], labels)
