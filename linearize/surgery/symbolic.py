"""Redirect activation calls in a graph: that of a `torch.fx.GraphModule`, or of a forward without source code.

A traced graph can replace a forward only if the forward computes the same each time (`purity.py`).
"""

from __future__ import annotations

import functools
import inspect
import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, fx, nn

from linearize.errors import ConvertError
from linearize.graph.protect import untouched
from linearize.purity import impurity

Options = dict[str, Any]
_SIMPLE = (type(None), bool, int, float, str)
_REMEDY = "Make the activation a module of its own, called once, and convert again."


class _Tracer(fx.Tracer):
    """Traces one forward; every child is a leaf, and what is done to a buffer becomes part of the graph."""

    proxy_buffer_attributes = True

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:  # noqa: ARG002 - fx's signature
        return True


def traced_forward(module: nn.Module, original: type[nn.Module], options: Options) -> Callable[..., Any]:
    """A forward generated from symbolic graphs, one for training and one for evaluation.

    Raises:
        ConvertError: the forward depends on something that a graph would hold still, cannot be traced, or does not
            make the calls.
    """
    why = impurity(module, inspect.unwrap(original.forward)) or _decorated(original.forward)
    if why is not None:
        found = f"the source of its forward cannot be read, and a graph would not stand for it, since it {why}"
        raise ConvertError(type(module).__name__, found, _REMEDY)
    in_eval, in_training = (_generated(module, options, training=training) for training in (False, True))
    concrete = options.get("concrete") or {}
    names = list(inspect.signature(original.forward).parameters)[1:]

    @functools.wraps(original.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        _check_specialised(type(self).__name__, concrete, dict(zip(names, args, strict=False)) | kwargs)
        return in_training(self, *args, **kwargs) if self.training else in_eval(self, *args, **kwargs)

    return forward


def _decorated(forward: Any) -> str | None:
    return "is decorated" if hasattr(forward, "__wrapped__") else None


def _check_specialised(where: str, concrete: dict[str, Any], given: dict[str, Any]) -> None:
    """Refuse a call whose arguments are others than those that the graph holds for."""
    for name in concrete.keys() & given.keys():
        value, traced = given[name], concrete[name]
        if isinstance(value, Tensor) or value != traced:
            shown = repr(value) if isinstance(value, _SIMPLE) else f"a {type(value).__name__}"
            found = f"was converted for calls with {name}={traced!r}, and is called with {shown}"
            raise ConvertError(where, found, f"Convert with example inputs that lead to {name}={shown}.")


def _generated(module: nn.Module, options: Options, *, training: bool) -> Callable[..., Any]:
    graph = _trace(module, options.get("concrete") or {}, training=training)
    redirect(graph, options["calls"], type(module).__name__)
    code = graph.python_code("self")
    namespace = dict(code.globals)
    # The source is what fx generated from the graph just above, as it does for every GraphModule.
    exec(compile(code.src, f"<linearize rewrite of {type(module).__name__}>", "exec"), namespace)  # noqa: S102
    generated: Callable[..., Any] = namespace["forward"]
    return generated


def redirect(graph: fx.Graph, calls: list[Options], where: str) -> None:
    """Turn calls in a graph into calls of children, in place.

    Raises:
        ConvertError: the graph does not make the calls, or a function would be told more than numbers; the graph is
            then as it was.
    """
    made: dict[str, list[fx.Node]] = {}
    for node in graph.nodes:
        made.setdefault(call_name(node), []).append(node)
    for call in calls:
        nodes = made.get(call["target"], [])
        if len(nodes) != call["of"] or call["index"] >= len(nodes):
            found = f"its graph calls {call['target']} {len(nodes)} times, the model {call['of']} times"
            raise ConvertError(where, found, _REMEDY)
        if len(nodes[call["index"]].all_input_nodes) != 1:
            raise ConvertError(where, f"its {call['target']} is a function of several values", _REMEDY)
    for call in calls:
        node = made[call["target"]][call["index"]]
        with graph.inserting_before(node):
            new = graph.create_node("call_module", call["child"], (node.all_input_nodes[0],))
        node.replace_all_uses_with(new)
        graph.erase_node(node)
    graph.lint()


def _trace(module: nn.Module, concrete: dict[str, Any], *, training: bool) -> fx.Graph:
    """The symbolic graph in one mode; code that asks for `self.training` sees that mode."""
    try:
        with untouched(module, training=training), _unwritten(module):
            graph = _Tracer().trace(module, concrete_args=dict(concrete) or None)
    except Exception as error:  # tracing runs the user's own code on proxies: anything may come out of it
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConvertError(type(module).__name__, f"its forward cannot be traced ({first})", _REMEDY) from error
    parts = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    held = [str(node.target) for node in graph.find_nodes(op="get_attr") if str(node.target) not in parts]
    if held:
        raise ConvertError(type(module).__name__, f"its traced forward would hold a constant ({held[0]})", _REMEDY)
    for node in graph.find_nodes(op="placeholder"):  # fx renames what it specialises; callers know the old name
        plain = node.target.rpartition("_")[0]
        node.target = plain if plain in concrete else node.target
    return graph


@contextmanager
def _unwritten(module: nn.Module) -> Iterator[None]:
    """Tensors in plain attributes are real while a forward is traced: what is written to them is no part of the graph.

    Raises:
        ValueError: something was written.
    """
    plain = {
        f"{path}.{name}" if path else name: value
        for path, part in module.named_modules()
        for name, value in vars(part).items()
        if isinstance(value, Tensor) and not value.is_inference()
    }
    before = {name: tensor._version for name, tensor in plain.items()}
    yield
    written = [name for name, version in before.items() if plain[name]._version != version]
    if written:
        raise ValueError(f"it writes to {written[0]}, which is no buffer")


def call_name(node: fx.Node) -> str:
    """The name of what a traced node calls: the path of a child, or a function without the in-place underscore."""
    if node.op == "call_function" and node.target is not operator.getitem:
        return str(getattr(node.target, "__name__", "")).rstrip("_")
    if node.op == "call_method":
        return str(node.target).rstrip("_")
    return str(node.target) if node.op == "call_module" else ""


def concrete_arguments(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of one call that are no tensors, by name, defaults included: what symbolic tracing must know.

    Examples:
        >>> class Net(nn.Module):
        ...     def forward(self, x, mask=None, scale=2): ...
        >>> concrete_arguments(Net(), (1.5,), {})
        {'x': 1.5, 'mask': None, 'scale': 2}
    """
    signature = inspect.signature(module.forward)
    bound = signature.bind(*args, **kwargs)
    bound.apply_defaults()
    return {name: value for name, value in bound.arguments.items() if isinstance(value, _SIMPLE)}
