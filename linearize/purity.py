"""Does code compute the same result each time? Decided from its bytecode.

A traced graph keeps what the forward read during tracing. It can replace the forward only if the forward writes
nothing, and reads nothing but its arguments, the module's children, parameters and buffers, its mode, and functions of
torch. An activation may be computed again in the backward pass only if it writes nothing and draws no random numbers.
"""

from __future__ import annotations

import dis
import functools
import math
import operator
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from torch.overrides import get_testing_overrides

_MODULES = (torch, torch.nn, torch.nn.functional, torch.special, math, operator)
_BUILTINS = (range, zip, enumerate, reversed, tuple, list, dict, min, max, sum, abs, float, int, slice)
_WRITES = ("STORE_ATTR", "DELETE_ATTR", "STORE_GLOBAL", "DELETE_GLOBAL", "STORE_SUBSCR", "STORE_SLICE", "DELETE_SUBSCR")
_OUTSIDE = (
    "IMPORT_NAME",
    "LOAD_DEREF",
    "LOAD_CLASSDEREF",
    "MAKE_FUNCTION",
    "LOAD_NAME",
    "YIELD_VALUE",
    "SETUP_WITH",
    "LOAD_SPECIAL",
    "BEFORE_",
)
_UNKNOWN = object()
_CONSTANTS = (type(None), bool, int, float, str, tuple)
_RANDOM = ("dropout", "bernoulli", "normal", "random", "uniform", "exponential", "rrelu", "rand")


def is_torch(function: Any) -> bool:
    """Whether a callable is a function of torch, or a method of a tensor: it computes the same each time.

    Examples:
        >>> is_torch(torch.relu), is_torch(torch.zeros(2).tanh), is_torch(lambda x: torch.relu(x))
        (True, True, False)
    """
    return isinstance(getattr(function, "__self__", None), Tensor) or (
        isinstance(function, (FunctionType, BuiltinFunctionType)) and function in get_testing_overrides()
    )


def repeats(activation: nn.Module) -> bool:
    """True if an activation that runs twice has the same effect and result as one that runs once.

    Examples:
        >>> class Noisy(nn.Module):
        ...     def forward(self, x):
        ...         self.last = torch.relu(x)
        ...         return self.last
        >>> repeats(nn.GELU()), repeats(Noisy())
        (True, False)
    """
    return all(_repeats(part) for part in activation.modules())


def _repeats(part: nn.Module) -> bool:
    if isinstance(part, (_DropoutNd, nn.RReLU)):
        return False
    if type(part).__module__.startswith("torch.nn."):
        return True
    function = vars(part).get("function")  # of layers of our own
    if isinstance(function, str):
        return function not in _RANDOM
    forward = type(part).forward if function is None else function
    while isinstance(forward, functools.partial):
        forward = forward.func
    if is_torch(forward):
        return not any(word in forward.__name__ for word in _RANDOM)
    if not isinstance(forward, FunctionType) or forward.__closure__:
        return False
    scope = _Scope(part if function is None else None, forward.__globals__, frozenset(), reads=True)
    return next(_findings(forward.__code__, scope), None) is None


def impurity(module: nn.Module, forward: Any) -> str | None:
    """What a module's forward reads or writes besides its arguments and parameters; None if nothing.

    Examples:
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
    names = frozenset(name for part in module.modules() for name in vars(part))
    return next(_findings(forward.__code__, _Scope(module, forward.__globals__, names)), None)


@dataclass
class _Scope:
    """What code may reach: its module, globals, and names of attributes that tensors have, too, perhaps.

    With `reads`, attributes of the module may be read.
    """

    module: nn.Module | None
    globals: dict[str, Any]
    names: frozenset[str]
    reads: bool = False
    seen: set[CodeType] = field(default_factory=set)


def _findings(code: CodeType, scope: _Scope) -> Iterator[str]:  # noqa: PLR0912 - a table of instructions
    me = code.co_varnames[0] if code.co_argcount and scope.module is not None else ""
    top: Any = _UNKNOWN  # what the last instruction has put on the stack, where that is known
    for instruction in dis.get_instructions(code):
        name, value = instruction.opname, instruction.argval
        if name.startswith(_WRITES):
            yield f"writes to {value or 'an object'}"
        if top is scope.module and me and name not in ("LOAD_ATTR", "LOAD_METHOD"):
            yield f"hands {me} on"
        if name.startswith(_OUTSIDE):
            yield f"reads or makes what a graph does not hold ({name})"
        elif name.startswith("LOAD_FAST"):
            loaded = value if isinstance(value, tuple) else (value,)
            if me in loaded[:-1]:
                yield f"hands {me} on"
            top = scope.module if me and loaded[-1] == me else _UNKNOWN
        elif name.startswith("STORE_FAST"):
            if me in (value if isinstance(value, tuple) else (value,)):
                yield f"uses the name {me} for something else"
            top = _UNKNOWN
        elif name == "LOAD_GLOBAL":
            top = scope.globals[value] if value in scope.globals else _builtin(scope.globals, value)
            if not _same_each_time(top) and not (scope.reads and _is_pure(top, scope)):
                yield f"reads the global {value}"
        elif name in ("LOAD_ATTR", "LOAD_METHOD"):
            found = _attribute(top, str(value), scope)
            if isinstance(found, str):
                yield found
                return
            top = found[0]
        elif name not in ("PUSH_NULL", "CACHE", "RESUME", "EXTENDED_ARG", "NOP"):
            top = _UNKNOWN


def _is_pure(function: Any, scope: _Scope, module: nn.Module | None = None) -> bool:
    """Whether a function, or a method of a module, of the user's own writes nothing and draws nothing."""
    if not isinstance(function, FunctionType) or function.__closure__ or function.__code__ in scope.seen:
        return False
    scope.seen.add(function.__code__)
    inner = _Scope(module, function.__globals__, scope.names, reads=True, seen=scope.seen)
    return next(_findings(function.__code__, inner), None) is None


def _builtin(scope: dict[str, Any], name: str) -> Any:
    held = scope.get("__builtins__", {})
    return held.get(name) if isinstance(held, dict) else getattr(held, name, None)


def _same_each_time(value: Any) -> bool:
    if isinstance(value, ModuleType):
        return value in _MODULES
    known = any(value is builtin for builtin in _BUILTINS) or isinstance(value, torch.dtype)
    return known or (callable(value) and not isinstance(value, type) and is_torch(value))


def _attribute(top: Any, name: str, scope: _Scope) -> str | tuple[Any]:
    """What an attribute is, or why reading it is refused."""
    if isinstance(top, nn.Module):
        return _of_module(top, name, scope)
    if isinstance(top, ModuleType):
        value = getattr(top, name, None)
        random = scope.reads and any(word in name for word in _RANDOM)
        if not random and (top in (math, operator) or _same_each_time(value)):
            return (value,)
        return f"calls {top.__name__}.{name}"
    written = scope.reads and (name.endswith("_") or any(word in name for word in _RANDOM))
    if written or name in scope.names or not (hasattr(Tensor, name) or name in ("append", "items", "keys", "values")):
        return f"reads an attribute {name}"
    return (_UNKNOWN,)


def _of_module(top: nn.Module, name: str, scope: _Scope) -> str | tuple[Any]:
    parts: dict[str, Any] = {**top._modules, **top._parameters, **top._buffers}
    if name in parts:
        return (parts[name] if isinstance(parts[name], nn.Module) else _UNKNOWN,)
    if name == "training" and top is scope.module:
        return (_UNKNOWN,)
    if scope.reads:
        value = vars(top).get(name, vars(type(top)).get(name, _UNKNOWN))
        while isinstance(value, functools.partial):
            value = value.func
        if isinstance(value, MethodType) and value.__self__ is top:
            value = value.__func__
        if isinstance(value, _CONSTANTS) or is_torch(value):
            return (_UNKNOWN,)
        if _is_pure(value, scope, top):
            return (_UNKNOWN,)
    return (
        f"reads self.{name}, which can change" if top is scope.module else f"reads {name} of a child, which can change"
    )
