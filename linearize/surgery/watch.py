"""Find out in a run which calls in a module's source make its activations, however the source spells them."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as _module
from torch.overrides import TorchFunctionMode

from linearize.graph.capture import Inputs
from linearize.graph.dryrun import run_once
from linearize.graph.ops import ACTIVATIONS
from linearize.purity import is_torch
from linearize.surgery.source import Place, callee_of, watched_methods

_log = logging.getLogger(__name__)


@dataclass
class _Open:
    """A call in the source while it runs: what is called, with what, and how many torch functions that has called."""

    method: str
    index: int
    callee: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    functions: int = 0
    out: Any = None


@dataclass
class _Made:
    """One evaluation of a function, or of a child: under which names, by which call, from what to what."""

    names: frozenset[str]
    by: _Open | None
    source: Any
    out: Any
    arguments: tuple[str, ...] = ()


def places_of(model: nn.Module, module: nn.Module, inputs: Inputs) -> dict[str, list[Place | None]]:
    """For each activation function or child that a module's forward calls, the places of the calls in its source.

    Args:
        model: is run once, as cheaply as it goes, in eval mode; it stays as it was.
        module: a part of it.
        inputs: of the model's forward.

    Returns:
        By name of the function (without the in-place underscore) or path of the child, a place for each call in the
        order of a run; None where no single call of the module's own source does just this. Empty if nothing runs, or
        if two runs of the module in one run of the model differ.
    """
    watcher = _Watcher(module)
    own = type(module)
    hooks = [
        _module.register_module_forward_pre_hook(watcher.enter),
        _module.register_module_forward_hook(watcher.leave, always_call=True),
    ]
    try:
        methods = watched_methods(module, watcher.watch)
        module.__class__ = type(own.__name__, (own,), methods)
        with watcher:
            run_once(model, inputs, before=watcher.clear)
    except Exception as error:  # whatever the model's own code raises
        _log.debug("no run to watch calls in: %s", error)
        return {}
    finally:
        module.__class__ = own
        for hook in hooks:
            hook.remove()
    runs = [_by_name(module, made) for made in watcher.runs]
    return runs[0] if runs and all(run == runs[0] for run in runs) else {}


class _Watcher(TorchFunctionMode):
    """Notes what a module's own code calls, from its forward's start to its end, outside of its children."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.names: dict[int, list[str]] = {}
        for path, part in module.named_modules(remove_duplicate=False):
            self.names.setdefault(id(part), []).append(path)
        self.clear()

    def clear(self) -> None:
        """Delete the notes of an attempt."""
        self.inside: list[nn.Module] = []
        self.open: list[_Open] = []
        self.runs: list[list[_Made]] = []

    def enter(self, module: nn.Module, _args: Any) -> None:
        """A module starts."""
        self.inside.append(module)
        if module is self.module:
            self.runs.append([])

    def leave(self, _module: nn.Module, _args: Any, _out: Any) -> None:
        """A module has finished."""
        self.inside.pop()

    def at_home(self) -> bool:
        """True if the module's own code runs now."""
        return bool(self.inside) and self.inside[-1] is self.module

    def watch(self, method: str, index: int, callee: Any) -> Callable[..., Any]:
        """The function to call at a place in the source, instead of `callee`."""
        if not self.at_home():
            return callee  # type: ignore[no-any-return]

        def call(*args: Any, **kwargs: Any) -> Any:
            opened = _Open(method, index, callee, args, kwargs)
            self.open.append(opened)
            try:
                opened.out = callee(*args, **kwargs)
            finally:
                self.open.remove(opened)
            if isinstance(callee, nn.Module) and id(callee) in self.names:
                given = next(iter((*args, *kwargs.values())), None)
                names = frozenset(self.names[id(callee)])
                self.runs[-1].append(_Made(names, opened, given, opened.out))
            return opened.out

        return call

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        name = str(getattr(func, "__name__", "")).strip("_")
        if self.at_home() and name != "get":  # reading an attribute of a tensor computes nothing
            for opened in self.open:
                opened.functions += 1
            if name in ACTIVATIONS:
                source = args[0] if args else next(iter((kwargs or {}).values()), None)
                by = self.open[-1] if self.open else None
                self.runs[-1].append(_Made(frozenset((name,)), by, source, out, _arguments(func, name)))
        return out


def _by_name(module: nn.Module, made: list[_Made]) -> dict[str, list[Place | None]]:
    found: dict[str, list[Place | None]] = {}
    for one in made:
        place = _place(module, one)
        for name in one.names:
            found.setdefault(name, []).append(place)
    return found


def _place(module: nn.Module, made: _Made) -> Place | None:
    """The call that does just this: it is given the tensor that is activated, and returns what the activation does.

    A function of the user's around the activation function is left alone: what it does may depend on anything.
    """
    by = made.by
    if by is None or by.out is not made.out:
        return None
    is_child = isinstance(by.callee, nn.Module)
    if not is_child and (by.functions != 1 or not is_torch(by.callee)):
        return None
    if getattr(by.callee, "__self__", None) is made.source:
        reads = "self"
    elif by.args:
        reads = "0" if by.args[0] is made.source else ""
    else:
        reads = next((name for name, value in by.kwargs.items() if value is made.source), "")
    callee = callee_of(module, by.method, by.index) if reads else None
    return None if callee is None else Place(by.method, by.index, callee, reads, is_child, made.arguments)


def _arguments(func: Any, name: str) -> tuple[str, ...]:
    """Names of a function's arguments after its input; "" for those that ATen's function does not have."""
    schema = getattr(torch.ops.aten, name).default._schema
    known = [argument.name for argument in schema.arguments][1:]
    try:
        told = list(inspect.signature(func).parameters)[1:]
    except (TypeError, ValueError):  # a function in C++: its arguments are those of ATen
        return tuple(known)
    return tuple(name if name in known else "" for name in told)


__all__ = ["places_of"]
