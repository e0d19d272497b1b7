"""Read a model with ``torch.export``: a graph of ATen operations, each with the module that called it.

The graph is for analysis only. Users always get the eager modules back.
"""

from __future__ import annotations

import io
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from linearize.errors import CaptureError
from linearize.graph.explain import explain
from linearize.graph.opaque import opaque_layers
from linearize.graph.protect import untouched
from linearize.graph.stacks import WRAPPED, Call, call_of, stack_of
from linearize.graph.state import muted
from linearize.nest import copied, plain_nest

Inputs = tuple[tuple[Any, ...], dict[str, Any]]

CONSTANT = "linearize_constant"  # marks the nodes whose value does not depend on the input
# A guard on dtype or device that torch.export writes between the real ops: it reads, and computes nothing.
_CHECKS = ("_assert_tensor_metadata", "_assert_scalar", "_assert_async", "sym_size", "sym_constrain_range")


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
        kept: so many of the graph's last outputs are none of the model's: the forward leaves them on its modules.
    """

    graph: fx.Graph
    calls: dict[fx.Node, Call] = field(default_factory=dict)
    ops: dict[Call, list[fx.Node]] = field(default_factory=dict)
    times: dict[str, int] = field(default_factory=dict)
    parameters: dict[fx.Node, str] = field(default_factory=dict)
    order: dict[fx.Node, int] = field(default_factory=dict)
    stacks: dict[fx.Node, tuple[Call, ...]] = field(default_factory=dict)
    kept: int = 0

    def returned(self, node: fx.Node) -> tuple[Any, ...]:
        """What the output node of the graph gives back to the model's caller."""
        results: Any = node.args[0]
        return tuple(results[: len(results) - self.kept])

    def path(self, node: fx.Node) -> str:
        """Path of the module that called the op; "" is the model itself."""
        return self.calls[node].path if node in self.calls else ""

    def siblings(self, node: fx.Node) -> list[fx.Node]:
        """The ops of the same module call, this one included."""
        return self.ops.get(self.calls[node], [node]) if node in self.calls else [node]


class _TensorsOnly(nn.Module):
    """Returns the tensors of a model's output: caches and other objects are no outputs of a graph.

    After them comes what the forward leaves on its modules, such as a feature map or an auxiliary loss: whoever reads
    it there is to find it there, so that nothing that it depends on may change.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.kept = 0

    def forward(self, *args: Any, **kwargs: Any) -> list[Tensor]:
        before = {id(tensor) for tensor in on_modules(self.model)}
        output = self.model(*args, **kwargs)
        kept = [tensor for tensor in on_modules(self.model) if id(tensor) not in before]
        self.kept = len(kept)
        return [*tensors_of(output), *_inside_objects(output), *kept]


def on_modules(model: nn.Module) -> list[Tensor]:
    """The tensors in attributes of modules that are no parameters and no buffers."""
    own = ("_parameters", "_buffers", "_modules")
    held = [value for part in model.modules() for name, value in vars(part).items() if name not in own]
    return list({id(tensor): tensor for tensor in tensors_of(held)}.values())


def _inside_objects(output: Any) -> list[Tensor]:
    """Tensors that the objects in a model's output hold: whoever reads them sees the hidden tensor itself."""
    if isinstance(output, Mapping):
        return [t for value in output.values() for t in _inside_objects(value)]
    if isinstance(output, (list, tuple)):
        return [t for value in output for t in _inside_objects(value)]
    plain_nest = isinstance(output, (Tensor, nn.Module, type)) or hasattr(output, "__dataclass_fields__")
    return [] if plain_nest else tensors_of(list(getattr(output, "__dict__", {}).values()))


def tensors_of(output: Any) -> list[Tensor]:
    """The tensors in a model's output, through dicts, dataclasses, lists and tuples; all else is left out.

    Examples:
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
    inputs = plain_nest(example_inputs)
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
        CaptureError: the model does not run on these inputs, its control flow depends on the data, or another thread
            runs it.
    """
    others: set[int] = set()
    failure: Exception | None = None
    try:
        with (
            untouched(model),
            _noting_others(model, others),
            warnings.catch_warnings(),
            torch.no_grad(),
            opaque_layers(model, inputs),
            silent(),
        ):
            warnings.simplefilter("ignore")
            whole = _TensorsOnly(model)
            program = torch.export.export(whole, *copied(inputs), strict=False)
    except Exception as error:  # whatever a model's own forward raises is a fact about the model, told as such
        failure = error
    if others:
        found = "was run by another thread while it was read"
        raise CaptureError(type(model).__name__, found, "Convert it where nothing else runs it.") from failure
    if failure is not None:
        raise CaptureError(*explain(model, inputs, failure)) from failure
    captured = _index(program, model)
    captured.kept = whole.kept
    return captured


@contextmanager
def _noting_others(model: nn.Module, others: set[int]) -> Iterator[None]:
    """Note which other threads run a model meanwhile: its modules are not their own then."""
    own = threading.get_ident()

    def note(*_: object) -> None:
        if threading.get_ident() != own:
            others.add(threading.get_ident())

    handle = model.register_forward_pre_hook(note)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def silent() -> Iterator[None]:
    """A failed export logs and prints its whole graph; the error says enough."""
    with muted("torch.export", "torch._export", "torch.fx", "torch._dynamo"), redirect_stderr(io.StringIO()):
        yield


def _index(program: torch.export.ExportedProgram, model: nn.Module) -> Capture:
    captured = Capture(program.graph)
    kinds = {path: type(module) for path, module in model.named_modules(remove_duplicate=False)}
    signature = program.graph_signature
    names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    called: dict[str, set[str]] = {}
    for position, node in enumerate(program.graph.nodes):
        captured.order[node] = position
        if node.op == "placeholder" and node.name in names:
            captured.parameters[node] = names[node.name].removeprefix(f"{WRAPPED}.")
        if node.name in names or node.name in signature.inputs_to_lifted_tensor_constants:
            node.meta[CONSTANT] = True
        if (
            node.op == "call_function"
            and node.all_input_nodes
            and all(CONSTANT in n.meta for n in node.all_input_nodes)
        ):
            node.meta[CONSTANT] = True
        stack = stack_of(node, kinds)
        for key, path in stack:
            called.setdefault(path, set()).add(key)
        if stack and node.op == "call_function" and not is_check(node):
            captured.stacks[node] = tuple(call_of(key, path) for key, path in stack)
            captured.calls[node] = captured.stacks[node][-1]
            captured.ops.setdefault(captured.calls[node], []).append(node)
    for inner in program.graph_module.modules():  # regions under autocast or another grad mode are graphs of their own
        if isinstance(inner, fx.GraphModule) and inner is not program.graph_module:
            for node in inner.graph.nodes:
                for key, path in stack_of(node, kinds):
                    called.setdefault(path, set()).add(key)
    captured.times = {path: len(keys) for path, keys in called.items()}
    return captured


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
