"""Functions that a module keeps in its attributes and calls as activations, such as `self.act = F.gelu`.

While a model is read, modules take their place. So a call of such a function can be recognised like that of a module.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import BuiltinFunctionType, FunctionType
from typing import Any

from torch import Tensor, nn

from linearize.graph.capture import Inputs
from linearize.graph.dryrun import run_once
from linearize.graph.protect import untouched

_log = logging.getLogger(__name__)


class Held(nn.Module):
    """A function that a module holds, as a child of that module.

    Examples:
        >>> import torch
        >>> Held(torch.relu)(torch.tensor([-1.0, 2.0])).tolist()
        [0.0, 2.0]
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The result of the function."""
        return self.function(*args, **kwargs)

    def extra_repr(self) -> str:
        """The function's name, for `print(model)`."""
        function = getattr(self.function, "func", self.function)
        return str(getattr(function, "__name__", type(function).__name__))


def may_be_held(module: nn.Module, name: str) -> bool:
    """Whether an attribute of a module is a function that can be held as a child."""
    value = vars(module).get(name)
    if not name.isidentifier() or name.startswith("_") or name == "forward" or hasattr(type(module), name):
        return False
    return issubclass(type(value), (FunctionType, BuiltinFunctionType, functools.partial)) or _is_callable_object(value)


def _is_nothing_else(module: nn.Module) -> bool:
    """True for a module without children and tensors: it may be an activation itself, and one site as a whole."""
    return not (module._modules or module._parameters or module._buffers)


def _is_callable_object(value: Any) -> bool:
    kind = type(value)
    plain = kind.__module__.partition(".")[0] not in ("torch", "builtins") and not issubclass(kind, (type, nn.Module))
    return plain and isinstance(vars(kind).get("__call__"), FunctionType)


def called_functions(model: nn.Module, inputs: Inputs) -> dict[str, list[str]]:
    """By module path, the names of attributes that are called on one tensor and give another one of its shape.

    The model runs once, as cheaply as it goes, if it has such attributes at all; it stays as it was.
    """
    candidates = {
        path: [name for name in list(vars(module)) if may_be_held(module, name)]
        for path, module in model.named_modules()
        if not _is_nothing_else(module)
    }
    candidates = {path: names for path, names in candidates.items() if names}
    if not candidates:
        return {}
    called: dict[tuple[str, str], bool] = {}

    def noting(key: tuple[str, str], function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            out = function(*args, **kwargs)
            fits = len(args) == 1 and not kwargs and isinstance(args[0], Tensor) and isinstance(out, Tensor)
            called[key] = called.get(key, True) and fits and args[0].shape == out.shape
            return out

        return functools.wraps(function)(call) if isinstance(function, FunctionType) else call

    try:
        with untouched(model):
            for path, names in candidates.items():
                module = model.get_submodule(path)
                for name in names:
                    vars(module)[name] = noting((path, name), vars(module)[name])
            run_once(model, inputs, before=called.clear)
    except Exception as error:  # whatever the model's own code raises
        _log.debug("no run to see which functions are called: %s", error)
        return {}
    found = {path: [name for name in names if called.get((path, name))] for path, names in candidates.items()}
    return {path: names for path, names in found.items() if names}


@contextmanager
def standing_in(model: nn.Module, inputs: Inputs) -> Iterator[None]:
    """Inside this context, called functions of a model are modules, and it is in eval mode. Then it is as before."""
    found = called_functions(model, inputs)
    with untouched(model):
        for path, names in found.items():
            module = model.get_submodule(path)
            for name in names:
                hold(module, name)
        yield


def hold(module: nn.Module, name: str) -> None:
    """Put a function that a module has in an attribute into a child of the same name."""
    function = vars(module).pop(name)
    module.add_module(name, Held(function))
