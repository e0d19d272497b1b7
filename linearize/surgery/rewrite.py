"""Rewrite one module's forward, where a module swap cannot reach an activation.

Two cases: the activation is a function call (``F.relu``), or one activation module is called several times. The
smallest module that makes the call is traced symbolically by torch.fx with all its children as leaves, each call
becomes the call of a child of its own, and the generated forward goes into a subclass of the module's class. Where
tracing fails, the calls are redirected in the source (`source.py`). Class checks, attributes, other methods, hooks and
state-dict names stay as they are.
"""

from __future__ import annotations

import copy
import functools
import inspect
import operator
from collections.abc import Callable
from typing import Any

from torch import Tensor, fx, nn

from linearize.errors import ConvertError
from linearize.surgery.layers import Elementwise
from linearize.surgery.source import methods_with

Options = dict[str, Any]
_SIMPLE = (type(None), bool, int, float, str)
_REMEDY = "Make the activation a module of its own, called once, and convert again."


class _Tracer(fx.Tracer):
    """Traces one forward; every child is a leaf."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:  # noqa: ARG002 - fx's signature
        return True


def rewrite_calls(module: nn.Module, options: Options) -> nn.Module:
    """The same module with some activation calls in its forward redirected to children of its own.

    Args:
        module: the module whose forward makes the calls; it is changed in place.
        options: ``calls``: for each call the new ``child``, the ``target`` (function, or child that is called), the
            ``index`` among the ``of`` calls of that target, for functions the ATen ``function`` with its ``options``,
            and the ``place`` of a call that is to be redirected in the source of a method. ``concrete``: the
            arguments of the forward that are no tensors, with their values.

    Raises:
        ConvertError: the forward cannot be traced, or does not make the calls. The module is then as it was.
    """
    if not all(isinstance(call["child"], str) and call["child"].isidentifier() for call in options["calls"]):
        raise ConvertError(type(module).__name__, "the name of a new child is no identifier", _REMEDY)
    if "forward" in vars(module):
        raise ConvertError(type(module).__name__, "its forward was put on the object, not on its class", _REMEDY)
    rewritten = _rewritten_class(module, type(module), options)
    children = {call["child"]: _child(module, call) for call in options["calls"]}
    for name, child in children.items():
        module.add_module(name, child.train(module.training))
    module.__class__ = rewritten
    return module


def _child(module: nn.Module, call: Options) -> nn.Module:
    if call.get("function"):
        return Elementwise(call["function"], call.get("options") or {})
    return copy.deepcopy(module.get_submodule(call["target"]))


def _rewritten_class(module: nn.Module, original: type[nn.Module], options: Options) -> type[nn.Module]:
    """A subclass of the module's class with methods that call the new children."""
    changed = _from_source(module, options) or {"forward": _from_graph(module, original, options)}

    def deep_copy(self: nn.Module, memo: dict[int, Any]) -> nn.Module:
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        new.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return new

    def reduce(self: nn.Module, _protocol: Any) -> Any:
        # A guard (linearize.guard) refers to the object that it stands on: it comes when that is there.
        later = {name: value for name, value in self.__dict__.items() if name == "save_pretrained"}
        first = {name: value for name, value in self.__dict__.items() if name not in later}
        return _restore, (original, options, first), later or None

    namespace = {"__module__": original.__module__, "__qualname__": original.__qualname__, "__doc__": original.__doc__}
    methods = {**changed, "__deepcopy__": deep_copy, "__reduce_ex__": reduce}
    return type(original.__name__, (original,), {**namespace, **methods})


def _from_source(module: nn.Module, options: Options) -> dict[str, Callable[..., Any]]:
    """The methods whose source has the calls; none if the calls have no places there."""
    placed = [call for call in options["calls"] if "place" in call]
    return methods_with(module, [(tuple(call["place"]), call["target"], call["child"]) for call in placed])


def _from_graph(module: nn.Module, original: type[nn.Module], options: Options) -> Callable[..., Any]:
    """A forward generated from symbolic graphs, one for training and one for evaluation."""
    in_eval, in_training = (_generated(module, options, training) for training in (False, True))
    concrete = options.get("concrete") or {}
    names = list(inspect.signature(original.forward).parameters)[1:]

    @functools.wraps(original.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        _check_specialised(type(self).__name__, concrete, dict(zip(names, args, strict=False)) | kwargs)
        return in_training(self, *args, **kwargs) if self.training else in_eval(self, *args, **kwargs)

    return forward


def _check_specialised(where: str, concrete: dict[str, Any], given: dict[str, Any]) -> None:
    """Refuse a call whose arguments are others than those that the graph holds for."""
    for name in concrete.keys() & given.keys():
        value, traced = given[name], concrete[name]
        if isinstance(value, Tensor) or value != traced:
            shown = repr(value) if isinstance(value, _SIMPLE) else f"a {type(value).__name__}"
            found = f"was converted for calls with {name}={traced!r}, and is called with {shown}"
            raise ConvertError(where, found, f"Convert with example inputs that lead to {name}={shown}.")


def _restore(original: type[nn.Module], options: Options, state: dict[str, Any]) -> nn.Module:
    """Unpickle a rewritten module: its forward is traced again from the original class."""
    module = original.__new__(original)
    module.__dict__.update(state)
    module.__class__ = _rewritten_class(module, original, options)
    return module


def _generated(module: nn.Module, options: Options, training: bool) -> Callable[..., Any]:
    graph = _trace(module, options.get("concrete") or {}, training)
    made: dict[str, list[fx.Node]] = {}
    for node in graph.nodes:
        made.setdefault(call_name(node), []).append(node)
    for call in options["calls"]:
        nodes = made.get(call["target"], [])
        if len(nodes) != call["of"]:
            found = f"its traced forward calls {call['target']} {len(nodes)} times, the model {call['of']} times"
            raise ConvertError(type(module).__name__, found, _REMEDY)
        node = nodes[call["index"]]
        source = node.args[0] if node.args else node.kwargs.get("input", node.kwargs.get("x"))
        with graph.inserting_before(node):
            new = graph.create_node("call_module", call["child"], (source,))
        node.replace_all_uses_with(new)
    for call in options["calls"]:
        graph.erase_node(made[call["target"]][call["index"]])
    graph.lint()
    code = graph.python_code("self")
    namespace = dict(code.globals)
    # The source is what fx generated from the graph just above, as it does for every GraphModule.
    exec(compile(code.src, f"<linearize rewrite of {type(module).__name__}>", "exec"), namespace)  # noqa: S102
    generated: Callable[..., Any] = namespace["forward"]
    return generated


def _trace(module: nn.Module, concrete: dict[str, Any], training: bool) -> fx.Graph:
    """The symbolic graph in one mode; code that asks for `self.training` sees that mode."""
    was = module.training
    module.training = training
    try:
        graph = _Tracer().trace(module, concrete_args=dict(concrete) or None)
    except Exception as error:  # tracing runs the user's own code on proxies: anything may come out of it
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConvertError(type(module).__name__, f"its forward cannot be traced ({first})", _REMEDY) from error
    finally:
        module.training = was
    for node in graph.find_nodes(op="placeholder"):  # fx renames what it specialises; callers know the old name
        plain = node.target.rpartition("_")[0]
        node.target = plain if plain in concrete else node.target
    return graph


def call_name(node: fx.Node) -> str:
    """What a traced node calls: the path of a child, or the name of a function without the in-place underscore."""
    if node.op == "call_function" and node.target is not operator.getitem:
        return str(getattr(node.target, "__name__", "")).rstrip("_")
    if node.op == "call_method":
        return str(node.target).rstrip("_")
    return str(node.target) if node.op == "call_module" else ""


def concrete_arguments(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of one call that are no tensors, by name, defaults included: what symbolic tracing must know.

    Example:
        >>> class Net(nn.Module):
        ...     def forward(self, x, mask=None, scale=2): ...
        >>> concrete_arguments(Net(), (1.5,), {})
        {'x': 1.5, 'mask': None, 'scale': 2}
    """
    signature = inspect.signature(module.forward)
    bound = signature.bind(*args, **kwargs)
    bound.apply_defaults()
    return {name: value for name, value in bound.arguments.items() if isinstance(value, _SIMPLE)}
