"""Whether a forward computes the same each time: shown by its bytecode, where no source is left to rewrite.

A graph holds what the forward read while it was traced. So it stands for the forward only where nothing is written, and
nothing is read but the arguments, the module's children, parameters and buffers, its mode, and functions of torch.
"""

from __future__ import annotations

import dis
import math
import operator
from collections.abc import Iterator
from types import CodeType, FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from linearize.surgery.layers import is_torch

_MODULES = (torch, torch.nn, torch.nn.functional, torch.special, math, operator)
_BUILTINS = (range, zip, enumerate, reversed, tuple, list, dict, min, max, sum, abs, float, int, slice)
_WRITES = ("STORE_ATTR", "DELETE_ATTR", "STORE_GLOBAL", "DELETE_GLOBAL", "STORE_SUBSCR", "STORE_SLICE", "DELETE_SUBSCR")
_OUTSIDE = ("IMPORT_NAME", "LOAD_DEREF", "LOAD_CLASSDEREF", "MAKE_FUNCTION", "LOAD_NAME", "YIELD_VALUE", "SETUP_WITH", "LOAD_SPECIAL", "BEFORE_")
_UNKNOWN = object()


def impurity(module: nn.Module, forward: Any) -> str | None:
    """What a module's forward reads or writes besides its arguments and parameters; None if nothing.

    Example:
        >>> class Net(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.scale = 2.0
        ...     def forward(self, x):
        ...         return torch.relu(x) * self.scale
        >>> impurity(Net(), Net.forward)
        'reads self.scale, which can change'
    """
    if not isinstance(forward, FunctionType):
        return "is no plain function"
    code = forward.__code__
    if code.co_freevars or forward.__closure__:
        return "reads names of the code around it"
    defaults = (*(forward.__defaults__ or ()), *(forward.__kwdefaults__ or {}).values())
    if any(isinstance(value, (list, dict, set)) for value in defaults):
        return "has a default argument that can change"
    names = {name for part in module.modules() for name in vars(part)}
    return next(_findings(code, forward.__globals__, module, names), None)


def _findings(code: CodeType, scope: dict[str, Any], module: nn.Module, names: set[str]) -> Iterator[str]:
    me = code.co_varnames[0] if code.co_argcount else ""
    top: Any = _UNKNOWN  # what the last instruction has put on the stack, where that is known
    for instruction in dis.get_instructions(code):
        name, value = instruction.opname, instruction.argval
        if top is module and name not in ("LOAD_ATTR", "LOAD_METHOD"):
            yield f"hands {me} on"
        if name.startswith(_WRITES):
            yield f"writes to {value or 'an object'}"
        elif name.startswith(_OUTSIDE):
            yield f"reads or makes what a graph does not hold ({name})"
        elif name.startswith("LOAD_FAST"):
            loaded = value if isinstance(value, tuple) else (value,)
            if me in loaded[:-1]:
                yield f"hands {me} on"
            top = module if loaded[-1] == me else _UNKNOWN
        elif name.startswith("STORE_FAST"):
            if me in (value if isinstance(value, tuple) else (value,)):
                yield f"uses the name {me} for something else"
            top = _UNKNOWN
        elif name == "LOAD_GLOBAL":
            top = scope[value] if value in scope else _builtin(scope, value)
            if not _same_each_time(top):
                yield f"reads the global {value}"
        elif name in ("LOAD_ATTR", "LOAD_METHOD"):
            found = _attribute(top, str(value), module, names)
            if isinstance(found, str):
                yield found
                return
            top = found[0]
        elif name not in ("PUSH_NULL", "CACHE", "RESUME", "EXTENDED_ARG", "NOP"):
            top = _UNKNOWN


def _builtin(scope: dict[str, Any], name: str) -> Any:
    held = scope.get("__builtins__", {})
    return held.get(name) if isinstance(held, dict) else getattr(held, name, None)


def _same_each_time(value: Any) -> bool:
    if isinstance(value, ModuleType):
        return value in _MODULES
    known = any(value is builtin for builtin in _BUILTINS) or isinstance(value, torch.dtype)
    return known or (callable(value) and not isinstance(value, type) and is_torch(value))


def _attribute(top: Any, name: str, module: nn.Module, names: set[str]) -> str | tuple[Any]:
    """What an attribute is, or why reading it is refused."""
    if isinstance(top, nn.Module):
        parts: dict[str, Any] = {**top._modules, **top._parameters, **top._buffers}
        if name in parts:
            return (parts[name] if isinstance(parts[name], nn.Module) else _UNKNOWN,)
        if name == "training" and top is module:
            return (_UNKNOWN,)
        return f"reads self.{name}, which can change" if top is module else f"reads {name} of a child, which can change"
    if isinstance(top, ModuleType):
        value = getattr(top, name, None)
        if top in (math, operator) or _same_each_time(value):
            return (value,)
        return f"calls {top.__name__}.{name}"
    if name in names or not (hasattr(Tensor, name) or name in ("append", "items", "keys", "values")):
        return f"reads an attribute {name}"
    return (_UNKNOWN,)
