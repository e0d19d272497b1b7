"""Rewrite one module's forward, where a module swap cannot reach an activation.

Two cases: the activation is a function call (``F.relu``), or one activation module is called several times. Each call
becomes the call of a child of its own: in the source of the smallest module that makes the call (`source.py`), in the
graph of a `torch.fx.GraphModule`, or, where there is no source, in a graph that is traced (`symbolic.py`). The methods
go into a subclass of the module's class. Class checks, attributes, other methods, hooks and state-dict names stay.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from keyword import iskeyword
from typing import Any

from torch import fx, nn

from linearize.errors import ConvertError
from linearize.graph.held import hold, may_be_held
from linearize.surgery.layers import Elementwise
from linearize.surgery.source import Place, methods_with
from linearize.surgery.subclass import subclass
from linearize.surgery.symbolic import Options, redirect, traced_forward

_REMEDY = "Make the activation a module of its own, called once, and convert again."


def rewrite_calls(module: nn.Module, options: Options) -> nn.Module:
    """The same module, with some activation calls in its forward redirected to children of its own.

    Args:
        module: the module whose forward makes the calls; it is changed in place.
        options: ``calls``: for each call the new ``child``, the ``target`` (function, or child that is called), the
            ``index`` among the ``of`` calls of that target, for functions the ATen ``function`` with its ``options``,
            and the ``place`` of a call that is to be redirected in the source of a method. ``concrete``: the
            arguments of the forward that are no tensors, with their values, for a forward without a source.

    Raises:
        ConvertError: the forward cannot be rewritten, or does not make the calls. The module is then as it was.
    """
    names = [call["child"] for call in options["calls"]]
    if not all(isinstance(name, str) and name.isidentifier() and not iskeyword(name) for name in names):
        raise ConvertError(type(module).__name__, "the name of a new child is no identifier", _REMEDY)
    hidden = next((name for name in names if hasattr(module, name)), None)
    if hidden is not None:
        raise ConvertError(type(module).__name__, f"the new child {hidden!r} would hide what is there", _REMEDY)
    children = {call["child"]: _child(module, call) for call in options["calls"]}
    if isinstance(module, fx.GraphModule):
        graph = copy.deepcopy(module.graph)
        redirect(graph, options["calls"], type(module).__name__)
        for name, child in children.items():
            module.add_module(name, child.train(module.training))
        module.graph = graph
        return module
    if "forward" in vars(module):
        raise ConvertError(type(module).__name__, "its forward was put on the object, not on its class", _REMEDY)
    rewritten = _rewritten_class(module, type(module), options)
    for name, child in children.items():
        module.add_module(name, child.train(module.training))
    module.__class__ = rewritten
    return module


def _child(module: nn.Module, call: Options) -> nn.Module:
    if call.get("function"):
        return Elementwise(call["function"], call.get("options") or {})
    called = module.get_submodule(call["target"])
    # What it learns or counts is one thing, wherever it is called.
    own = any(True for _ in called.parameters()) or any(True for _ in called.buffers())
    return called if own else copy.deepcopy(called)


def _rewritten_class(module: nn.Module, original: type[nn.Module], options: Options) -> type[nn.Module]:
    """A subclass of the module's class with methods that call the new children."""
    placed = [call for call in options["calls"] if "place" in call]
    changed: dict[str, Callable[..., Any]] = methods_with(
        module, [(_place(call), call["target"], call["child"]) for call in placed]
    )
    if not placed:
        changed = {"forward": traced_forward(module, original, options)}
    return subclass(original, changed, functools.partial(_rewrite_again, options))


def _rewrite_again(options: Options, module: nn.Module) -> None:
    """Give an unpickled module, whose children are there already, its rewritten class."""
    module.__class__ = _rewritten_class(module, type(module), options)


def _place(call: Options) -> Place:
    place = call["place"]
    return Place(**{**place, "arguments": tuple(place.get("arguments", ()))})


def hold_function(module: nn.Module, options: Options) -> nn.Module:
    """The same module with a function of its attributes (`self.act = F.gelu`) as a child of that name.

    Args:
        module: it is changed in place.
        options: ``attribute``, the name.

    Raises:
        ConvertError: it has no such function.
    """
    name = options["attribute"]
    if not isinstance(name, str) or not may_be_held(module, name):
        found = f"has no attribute {name!r} that is a function"
        raise ConvertError(type(module).__name__, found, "Load it onto the model that it was made from.")
    hold(module, name)
    return module
