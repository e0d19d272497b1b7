"""Read a model with ``torch.export``: a graph of ATen ops, each op with the module that called it.

The graph is for analysis only; what the user gets back is always the eager module tree.
"""

from __future__ import annotations

import copy
import functools
import gc
import io
import logging
import re
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, field
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from linearize.errors import CaptureError
from linearize.graph.opaque import opaque_layers
from linearize.nest import copied, plain

Inputs = tuple[tuple[Any, ...], dict[str, Any]]

CONSTANT = "linearize_constant"  # marks the nodes whose value does not depend on the input
_WRAPPED = "model"
# A guard on dtype or device that torch.export writes between the real ops: it reads, and computes nothing.
_CHECKS = ("_assert_tensor_metadata", "_assert_scalar", "_assert_async", "sym_size", "sym_constrain_range")


@dataclass(frozen=True)
class Call:
    """One call of one module: its path in the model and which call of that module it is, from 0."""

    path: str
    index: int


@dataclass
class Capture:
    """A captured model.

    Attributes:
        graph: the ``torch.fx`` graph of ATen ops, in order of execution.
        calls: the innermost module call of every op.
        ops: the ops that each module call made itself, not through its children.
        times: how often each module was called.
        parameters: name of the parameter or buffer behind a placeholder.
        order: position of every node in the graph.
        stacks: the module calls that an op runs in, from the outermost to the innermost.
    """

    graph: fx.Graph
    calls: dict[fx.Node, Call] = field(default_factory=dict)
    ops: dict[Call, list[fx.Node]] = field(default_factory=dict)
    times: dict[str, int] = field(default_factory=dict)
    parameters: dict[fx.Node, str] = field(default_factory=dict)
    order: dict[fx.Node, int] = field(default_factory=dict)
    stacks: dict[fx.Node, tuple[Call, ...]] = field(default_factory=dict)

    def path(self, node: fx.Node) -> str:
        """Path of the module that called the op; "" is the model itself."""
        return self.calls[node].path if node in self.calls else ""

    def siblings(self, node: fx.Node) -> list[fx.Node]:
        """The ops of the same module call, this one included."""
        return self.ops.get(self.calls[node], [node]) if node in self.calls else [node]


class _TensorsOnly(nn.Module):
    """Returns the tensors of a model's output: caches and other objects are no outputs of a graph."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Any, **kwargs: Any) -> list[Tensor]:
        output = self.model(*args, **kwargs)
        return [*tensors_of(output), *_inside_objects(output)]


def _inside_objects(output: Any) -> list[Tensor]:
    """Tensors that the objects in a model's output hold: whoever reads them sees the hidden tensor itself."""
    if isinstance(output, Mapping):
        return [t for value in output.values() for t in _inside_objects(value)]
    if isinstance(output, (list, tuple)):
        return [t for value in output for t in _inside_objects(value)]
    plain = isinstance(output, (Tensor, nn.Module, type)) or hasattr(output, "__dataclass_fields__")
    return [] if plain else tensors_of(list(getattr(output, "__dict__", {}).values()))


def tensors_of(output: Any) -> list[Tensor]:
    """The tensors in a model's output, through dicts, dataclasses, lists and tuples; all else is left out.

    Example:
        >>> len(tensors_of({"logits": torch.zeros(2), "cache": object(), "states": (torch.ones(1),)}))
        2
    """
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, Mapping):
        return [t for value in output.values() for t in tensors_of(value)]
    if isinstance(output, (list, tuple)):
        return [t for value in output for t in tensors_of(value)]
    if hasattr(output, "__dataclass_fields__"):
        return [t for name in output.__dataclass_fields__ for t in tensors_of(getattr(output, name))]
    return []


def normalize_inputs(example_inputs: Any) -> Inputs:
    """Positional and keyword arguments from a tensor, a tuple (or list) of them, or a dict of keyword arguments.

    In containers of their own, mappings of other classes as dicts, nested ones, too.
    """
    inputs = plain(example_inputs)
    if isinstance(inputs, dict):
        return (), inputs
    if isinstance(inputs, (tuple, list)):
        return tuple(inputs), {}
    return (inputs,), {}


def fake_inputs(inputs: Inputs, device: str | torch.device = "meta") -> Inputs:
    """The same inputs with every tensor emptied on another device: shapes and dtypes without memory."""
    moved: Inputs = pytree.tree_map_only(
        Tensor, lambda t: torch.empty_like(t, device=device) if device == "meta" else t.to(device), inputs
    )
    return moved


def capture(model: nn.Module, inputs: Inputs) -> Capture:
    """Capture `model` on `inputs` in eval mode; the model is not changed, and no parameter is copied.

    Args:
        model: an eager module; meta tensors are fine.
        inputs: positional and keyword arguments for its forward.

    Raises:
        CaptureError: the model does not run on these inputs, or its control flow depends on the data.
    """
    try:
        with untouched(model), warnings.catch_warnings(), torch.no_grad(), opaque_layers(model, inputs), _silent():
            warnings.simplefilter("ignore")
            program = torch.export.export(_TensorsOnly(model), *copied(inputs), strict=False)
    except Exception as error:  # whatever a model's own forward raises is a fact about the model, told as such
        raise CaptureError(*_explain(model, inputs, error)) from error
    return _index(program)


@contextmanager
def _silent() -> Iterator[None]:
    """A failed export logs and prints its whole graph; the error says enough."""
    loggers = [logging.getLogger(name) for name in ("torch.export", "torch._export", "torch.fx", "torch._dynamo")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextmanager
def untouched(model: nn.Module, *, training: bool = False) -> Iterator[None]:
    """A model in eval mode (or in training mode); afterwards its modules have the modes and attributes they had.

    Whatever a forward leaves on its module (a feature map, a cache, a buffer put anew) would be a fake tensor here. So
    would tensors that a function remembers (`functools.lru_cache`): those are forgotten before and after.

    Example:
        >>> layer = nn.Dropout()
        >>> with untouched(layer):
        ...     layer.seen = layer.training
        >>> layer.training, hasattr(layer, "seen")
        (True, False)
    """
    held = [(module, module.training, dict(vars(module)), _contents(module)) for module in model.modules()]
    memories = _memories(model)
    _forget_tensors(memories)
    try:
        for module, *_ in held:
            module.training = training
        yield
    finally:
        for module, mode, attributes, contents in held:
            module.training = mode  # a scripted module does not keep it among its attributes
            vars(module).clear()
            vars(module).update(attributes)
            for container, content in contents:
                container.clear()
                container.update(content) if isinstance(container, (dict, set)) else container.extend(content)
        _forget_tensors(memories)


def _memories(model: nn.Module) -> list[Any]:
    """What a model's methods, and functions beside its classes, remember results in; also inside a wrapper."""
    kinds = {cls for module in model.modules() for cls in type(module).__mro__}
    files = {id(file): vars(file) for cls in kinds if (file := sys.modules.get(cls.__module__)) is not None}
    places = [*map(vars, model.modules()), *map(vars, kinds), *files.values()]
    held = [getattr(value, "__func__", value) for place in places for value in list(place.values())]
    held += [c.cell_contents for v in held if isinstance(v, FunctionType) for c in v.__closure__ or () if _full(c)]
    return [value for value in held if isinstance(value, functools._lru_cache_wrapper)]


def _forget_tensors(memories: list[Any]) -> None:
    """Clear the caches that hold a tensor; a tokenizer or a configuration that a function remembers stays."""
    for memory in memories:
        held, seen = gc.get_referents(memory), 0
        while seen < len(held):
            if isinstance(held[seen], Tensor):
                memory.cache_clear()
                break
            if isinstance(held[seen], (dict, list, tuple)) or "lru_list" in type(held[seen]).__name__:
                held += gc.get_referents(held[seen])
            seen += 1


def _full(cell: Any) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:  # a name that has no value yet
        return False


def _contents(module: nn.Module) -> list[tuple[Any, Any]]:
    """The dicts, lists and sets that a module holds (its parameters, its caches), each with a copy of what is in it."""
    return [(value, copy.copy(value)) for value in vars(module).values() if isinstance(value, (dict, list, set))]


def _explain(model: nn.Module, inputs: Inputs, error: Exception) -> tuple[str, str, str]:
    """Whether the inputs or the capture failed: only a plain run can tell."""
    first = next((line for line in str(error).strip().splitlines() if line.strip()), type(error).__name__)
    name = type(model).__name__
    scripted = next((path for path, part in model.named_modules() if isinstance(part, torch.jit.ScriptModule)), None)
    if scripted is not None:
        return scripted or name, "is a scripted module, which has no Python left to rewrite", "Put the eager one there."
    try:
        with untouched(model), torch.no_grad():
            args, kwargs = copied(inputs)
            model(*args, **kwargs)
    except Exception as failure:  # same reason as above
        line = next((text for text in str(failure).strip().splitlines() if text.strip()), "")
        shapes = [tuple(t.shape) for t in tensors_of([inputs[0], inputs[1]])]
        return (
            name,
            f"does not run on the example inputs of shapes {shapes} ({type(failure).__name__}: {line})",
            "Pass example_inputs= that the model's forward takes.",
        )
    return (
        name,
        f"runs, but torch.export cannot capture it ({type(error).__name__}: {first})",
        "Make the control flow independent of the data, or convert the submodule that holds the activations.",
    )


def _index(program: torch.export.ExportedProgram) -> Capture:
    captured = Capture(program.graph)
    signature = program.graph_signature
    names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    called: dict[str, set[str]] = {}
    for position, node in enumerate(program.graph.nodes):
        captured.order[node] = position
        if node.op == "placeholder" and node.name in names:
            captured.parameters[node] = names[node.name].removeprefix(f"{_WRAPPED}.")
        if node.name in names or node.name in signature.inputs_to_lifted_tensor_constants:
            node.meta[CONSTANT] = True
        if (
            node.op == "call_function"
            and node.all_input_nodes
            and all(CONSTANT in n.meta for n in node.all_input_nodes)
        ):
            node.meta[CONSTANT] = True
        stack: dict[str, Any] = node.meta.get("nn_module_stack") or {}
        for key, (path, _) in stack.items():
            called.setdefault(_strip(path), set()).add(key)
        if stack and node.op == "call_function" and not is_check(node):
            captured.stacks[node] = tuple(_call(key, path) for key, (path, _) in stack.items())
            captured.calls[node] = captured.stacks[node][-1]
            captured.ops.setdefault(captured.calls[node], []).append(node)
    for inner in program.graph_module.modules():  # regions under autocast or another grad mode are graphs of their own
        if isinstance(inner, fx.GraphModule) and inner is not program.graph_module:
            for node in inner.graph.nodes:
                for key, (path, _) in (node.meta.get("nn_module_stack") or {}).items():
                    called.setdefault(_strip(path), set()).add(key)
    captured.times = {path: len(keys) for path, keys in called.items()}
    return captured


def _call(key: str, path: str) -> Call:
    repeat = re.search(r"@(\d+)$", key)
    return Call(_strip(path), int(repeat.group(1)) if repeat else 0)


def _strip(path: str) -> str:
    path = re.sub(r"@\d+", "", path)
    return "" if path == _WRAPPED else path.removeprefix(f"{_WRAPPED}.")


def is_check(node: fx.Node) -> bool:
    """True for the guards and size reads that torch.export adds."""
    return node.op == "call_function" and any(check in str(node.target) for check in _CHECKS)


def users(node: fx.Node) -> list[fx.Node]:
    """The ops that compute with a node's value."""
    return [user for user in node.users if not is_check(user)]


def shape(node: Any) -> tuple[int, ...] | None:
    """Shape of a node's value, or None if it is no single tensor of fixed shape."""
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    if not isinstance(value, Tensor):
        return None
    sizes = tuple(value.shape)
    return sizes if all(isinstance(size, int) for size in sizes) else None


def tensor_args(node: fx.Node) -> Iterator[fx.Node]:
    """The nodes among an op's arguments, lists included, in order."""
    return iter(node.all_input_nodes)
