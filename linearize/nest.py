"""Nested tuples, lists, dicts and dataclasses: the shape of batches and outputs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor, nn

__all__ = ["copied", "leaves_of", "mapped", "plain_nest"]

_ATOMS = (str, bytes, int, float, complex, type(None), type, nn.Module)


def leaves_of(nest: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """The values in a nest, each with its path. The path of a single value is "".

    Examples:
        >>> list(leaves_of({"a": 1, "b": (2, {"c": 3})}))
        [('a', 1), ('b.0', 2), ('b.1.c', 3)]
    """
    inside = _inside(nest)
    if inside is None:
        yield name, nest
        return
    for key, value in inside:
        yield from leaves_of(value, f"{name}.{key}" if name else str(key))


def _inside(nest: Any) -> list[tuple[Any, Any]] | None:
    if isinstance(nest, Mapping):
        return list(nest.items())
    if isinstance(nest, tuple | list):
        return list(enumerate(nest))
    if is_dataclass(nest) and not isinstance(nest, type):
        return [(entry.name, getattr(nest, entry.name, None)) for entry in fields(nest)]
    return None


def mapped(nest: Any, function: Callable[[Any], Any]) -> Any:
    """The same nest in new containers, with a function applied to its values.

    Mappings of any class become dicts, since a forward, torch.export and pytrees know these; dataclasses (and with them
    the outputs of transformers, which are both) and named tuples keep their class.

    Examples:
        >>> from collections import UserDict
        >>> mapped((1, UserDict(a=[2])), lambda value: value + 1)
        (2, {'a': [3]})
    """
    if is_dataclass(nest) and not isinstance(nest, type):
        twin = copy.copy(nest)
        for entry in fields(nest):
            if hasattr(nest, entry.name):
                _set(twin, entry.name, mapped(getattr(nest, entry.name), function))
        return twin
    if isinstance(nest, Mapping):
        return {key: mapped(value, function) for key, value in nest.items()}
    if isinstance(nest, tuple | list):
        values = [mapped(value, function) for value in nest]
        if hasattr(nest, "_fields"):
            return type(nest)(*values)
        return tuple(values) if isinstance(nest, tuple) else values
    return function(nest)


def _set(target: Any, name: str, value: Any) -> None:
    try:
        setattr(target, name, value)
    except AttributeError:  # frozen
        object.__setattr__(target, name, value)


def plain_nest(nest: Any) -> Any:
    """The same values in containers of their own, mappings as plain dicts."""
    return mapped(nest, lambda value: value)


def copied(nest: Any) -> Any:
    """A copy of a nest, so that a model cannot change the original. A tensor that occurs twice stays one.

    Tensors lose their history of gradients. Objects of other kinds, such as caches, are copied if they can be.

    Examples:
        >>> import torch
        >>> x = torch.ones(2)
        >>> twin = copied({"x": x, "again": [x]})
        >>> twin["x"] is twin["again"][0], twin["x"] is x
        (True, False)
    """
    seen: dict[int, Any] = {}

    def one(value: Any) -> Any:
        if isinstance(value, _ATOMS):
            return value
        if id(value) not in seen:
            seen[id(value)] = value.detach().clone() if isinstance(value, Tensor) else _deep(value)
        return seen[id(value)]

    return mapped(nest, one)


def _deep(value: Any) -> Any:
    try:
        return copy.deepcopy(value)
    except Exception:  # a generator, a handle, a tensor with a history inside: the same object must do
        return value
