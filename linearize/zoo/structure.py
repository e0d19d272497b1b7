"""Compare two models in everything except the weights, and find the tensors outside the state dict."""

from __future__ import annotations

import types
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from linearize.zoo.plain import is_plain, same

_FUNCTIONS = (types.FunctionType, types.BuiltinFunctionType)

TensorPath = tuple[Any, ...]
"""Where a plain tensor hangs in a module: the attribute's name, then indices and keys of containers."""

# What every module carries: hooks and registries, the training flag; and what linearize attaches.
_OWN = frozenset(nn.Module().__dict__) | {"_linearize", "_linearize_recipe"}


def stored_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by path, those that are shared under each of their names."""
    found: dict[str, Tensor] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        dot = f"{prefix}." if prefix else ""
        for name, parameter in module._parameters.items():
            if parameter is not None:
                found[dot + name] = parameter
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                found[dot + name] = buffer
    return found


def plain_tensors(module: nn.Module) -> dict[TensorPath, Tensor]:
    """The module's own tensors that no state dict holds: non-persistent buffers and tensors in attributes."""
    found: dict[TensorPath, Tensor] = {}
    for name in module._non_persistent_buffers_set:
        buffer = module._buffers.get(name)
        if buffer is not None:
            found[(name,)] = buffer
    for name, value in module.__dict__.items():
        if name not in _OWN:
            _gather(value, (name,), found)
    return found


def _gather(value: object, path: TensorPath, found: dict[TensorPath, Tensor]) -> None:
    if isinstance(value, Tensor):
        found[path] = value
    elif isinstance(value, (list, tuple)) and type(value) in (list, tuple):
        for index, item in enumerate(value):
            _gather(item, (*path, index), found)
    elif isinstance(value, dict) and type(value) is dict:
        for key, item in value.items():
            if type(key) in (str, int):
                _gather(item, (*path, key), found)


def put_tensor(module: nn.Module, path: TensorPath, tensor: Tensor) -> bool:
    """Put a plain tensor where `plain_tensors` found it; False if there is no such place."""
    name, *inner = path
    if name in module._buffers:
        if inner or name not in module._non_persistent_buffers_set:
            return False
        module._buffers[name] = tensor
        return True
    if name in _OWN or name in module._parameters or name in module._modules:
        return False
    if not inner:
        if not isinstance(module.__dict__.get(name, getattr(type(module), name, None)), (Tensor, type(None))):
            return False  # it would hide a method, or stand for something else
        module.__dict__[name] = tensor
        return True
    container = module.__dict__.get(name)
    for key in inner[:-1]:
        container = _item(container, key)
    key = inner[-1]
    if isinstance(container, (list, dict)) and isinstance(_item(container, key), Tensor):
        container[key] = tensor
        return True
    return False


def is_taken(module: nn.Module, path: TensorPath) -> bool:
    """Whether anything stands at a path, a tensor or not; a list that is too short has nothing there."""
    name, *inner = path
    found = getattr(module, name, None)
    for key in inner:
        if found is not None and not isinstance(found, (list, tuple, dict)):
            return True
        found = _item(found, key)
    return found is not None


def _item(container: Any, key: Any) -> Any:
    if isinstance(container, dict):
        return container.get(key)
    fits = isinstance(container, (list, tuple)) and isinstance(key, int) and 0 <= key < len(container)
    return container[key] if fits else None


def forget_parameters(model: nn.Module) -> None:
    """Replace each parameter by one without memory; shared ones stay shared."""
    moved: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                empty = nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)
                module._parameters[name] = moved.setdefault(id(parameter), empty)


def plain_attributes(module: nn.Module) -> dict[str, Any]:
    """The module's own attributes that are plain data."""
    return {name: value for name, value in module.__dict__.items() if name not in _OWN and is_plain(value)}


@dataclass
class Difference:
    """How a model differs from a freshly built one.

    Attributes:
        problem: what makes the two different functions for good; None if nothing does.
        attributes: (module path, attribute, value in the model) where plain data differs.
        tensors: (module path, path in the module, tensor) where tensors outside the state dict differ.
    """

    problem: str | None = None
    attributes: list[tuple[str, str, Any]] = field(default_factory=list)
    tensors: list[tuple[str, TensorPath, Tensor]] = field(default_factory=list)


def compare(fresh: nn.Module, model: nn.Module) -> Difference:
    """Compare ``model`` with one built ``fresh``: classes, names, shapes, plain attributes, other tensors.

    Examples:
        >>> compare(nn.Linear(2, 3), nn.Linear(2, 4)).problem
        'weight is of shape (4, 2), rebuilt (3, 2)'
    """
    problem = _module_problem(fresh, model) or _state_problem(fresh, model) or _function_problem(fresh, model)
    difference = Difference(problem)
    if difference.problem is None:
        rebuilt = dict(fresh.named_modules())
        for path, module in model.named_modules():
            if path in rebuilt:
                _compare_module(path, rebuilt[path], module, difference)
    return difference


def _compare_module(path: str, fresh: nn.Module, module: nn.Module, difference: Difference) -> None:
    ours = plain_attributes(fresh)
    for name, value in plain_attributes(module).items():
        if name in ours and not same(ours[name], value):
            difference.attributes.append((path, name, value))
    tensors = plain_tensors(fresh)
    for where, tensor in plain_tensors(module).items():
        other = tensors.get(where)
        if isinstance(tensor, nn.Parameter) and isinstance(other, nn.Parameter):
            continue  # a second reference to a weight
        if other is None and not _has_place(fresh, where):
            continue  # made by a forward: the rebuilt model will make it, too
        if other is None or other.is_meta or not _equal(other, tensor):
            difference.tensors.append((path, where, tensor))


def _has_place(module: nn.Module, where: TensorPath) -> bool:
    name, *inner = where
    return not inner and (name in module.__dict__ or name in module._buffers)


def _equal(a: Tensor, b: Tensor) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape or b.is_meta or a.layout != b.layout:
        return False
    return torch.equal(a, b.detach().to(a.device))


def _module_problem(fresh: nn.Module, model: nn.Module) -> str | None:
    ours = {name: _kind(module) for name, module in fresh.named_modules(remove_duplicate=False)}
    theirs = {name: _kind(module) for name, module in model.named_modules(remove_duplicate=False)}
    for name in [*theirs, *ours]:
        if ours.get(name) != theirs.get(name):
            found, rebuilt = theirs.get(name, "nothing"), ours.get(name, "nothing")
            return f"{name or 'the model'} is {found}, rebuilt {rebuilt}"
    return None


def _kind(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def _function_problem(fresh: nn.Module, model: nn.Module) -> str | None:
    """Functions that modules keep in attributes, such as an activation."""
    rebuilt = dict(fresh.named_modules())
    for path, module in model.named_modules():
        for name, value in module.__dict__.items():
            other = rebuilt[path].__dict__.get(name) if path in rebuilt else None
            if isinstance(value, _FUNCTIONS) and isinstance(other, _FUNCTIONS) and _named(value) != _named(other):
                return f"{path}.{name} is {_named(value)}, rebuilt {_named(other)}"
    return None


def _named(function: Any) -> str:
    return f"{function.__module__}.{function.__qualname__}"


def _state_problem(fresh: nn.Module, model: nn.Module) -> str | None:
    ours = {name: tuple(tensor.shape) for name, tensor in stored_tensors(fresh).items()}
    theirs = {name: tuple(tensor.shape) for name, tensor in stored_tensors(model).items()}
    for name in [*theirs, *ours]:
        if ours.get(name) != theirs.get(name):
            found, rebuilt = theirs.get(name, "absent"), ours.get(name, "absent")
            return f"{name} is of shape {found}, rebuilt {rebuilt}"
    return None
