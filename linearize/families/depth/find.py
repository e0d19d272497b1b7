"""The chains of layers of a gated model, and which of their layers can go."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from linearize.cost import flops_of_modules
from linearize.errors import CaptureError, CollapseError
from linearize.families.depth.apply import skip_layers
from linearize.families.depth.place import ChainLayer, LayerChain
from linearize.families.enclosing import is_in, may_go, meddled
from linearize.families.reading import read
from linearize.families.trials import run_watched
from linearize.gating.gate import ChannelGate
from linearize.graph.capture import Capture, Inputs, capture, shape, tensors_of, users
from linearize.graph.dryrun import first_line
from linearize.graph.ops import op_name
from linearize.graph.overlap import shared_parameters
from linearize.graph.problem import Dead
from linearize.graph.protect import untouched
from linearize.graph.walk import Walker
from linearize.running.copies import duplicate
from linearize.running.models import batches_of, call, evaluating
from linearize.sites.site import Port
from linearize.zoo.layers import close_up

__all__ = ["chains_of"]

_QUIET = ("dropout", "to", "_to_copy", "contiguous", "clone", "alias", "view", "reshape", "add", "_unsafe_view")
_TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-4}  # the same ops run: only kernels may differ


@dataclass
class _Call:
    """One call of a layer."""

    times: int = 0
    given: Tensor | None = None
    made: Tensor | None = None
    keyword: str = ""
    nones: int = 0
    rows: bool = False
    odd: bool = False


def chains_of(
    model: nn.Module,
    batch: Any,
    homes: Mapping[str, Sequence[str]],
    memory: MutableMapping[str, Any] | None = None,
) -> list[LayerChain]:
    """Lists of layers that run one after the other, each on what the one before it gave.

    Args:
        model: gated.
        batch: one, for which costs are counted.
        homes: by site, the paths of all that belongs to its group.
        memory: what is known of the model already.
    """
    found = [chain for path, module in model.named_modules() if (chain := _chain(model, path, module, batch))]
    if not found:
        return []
    costs, hooked = flops_of_modules(model, batch), meddled(model)
    for layer in (layer for chain in found for layer in chain.layers):
        module = model.get_submodule(layer.path)
        gated = sum(gate.alpha.numel() for gate in module.modules() if isinstance(gate, ChannelGate))
        layer.params = float(sum(parameter.numel() for parameter in module.parameters()) - gated)
        layer.flops = float(costs.get(layer.path, 0))
        if layer.reason is None and any(map(is_in(layer.path), hooked)):
            layer.reason = "a module inside has a hook, which would be lost"
        if layer.reason is None and not may_go(model, layer.path, homes):
            layer.reason = "sites that share maps are half inside, or were excluded"
    captured = read(model, batch, memory).captured
    if captured is None:
        with suppress(CaptureError):
            captured = capture(model, batches_of(batch)[0])
    if captured is not None:
        _find_projections(model, captured, found)
    for chain in found:
        why = _failure(model, chain, batch) if chain.free else None
        for layer in chain.layers if why is not None else ():
            layer.reason = layer.reason or why
    return found


def _chain(model: nn.Module, path: str, module: nn.Module, batch: Any) -> LayerChain | None:
    """The layers of a list, if they are a chain."""
    children = list(module.named_children())
    if not path or not isinstance(module, (nn.ModuleList, nn.Sequential)) or len(children) < 2:
        return None
    if len({type(child) for _, child in children}) > 1 or not any(True for _ in children[0][1].children()):
        return None
    calls = _calls(model, [child for _, child in children], batch)
    layers, before = [], None
    for (name, _), seen in zip(children, calls, strict=True):
        if seen.times != 1 or seen.given is None or (before is not None and seen.given is not before):
            return None
        before = seen.made
        reason = None
        if seen.odd or seen.made is None:
            reason = "it gives more than one tensor"
        elif seen.made.shape != seen.given.shape:
            reason = "it gives another shape than it takes"
        sizes = tuple(seen.given.shape)
        layers.append(
            ChainLayer(f"{path}.{name}", None, seen.keyword, seen.nones, seen.rows, shape=sizes, reason=reason)
        )
    return LayerChain(layers)


def _calls(model: nn.Module, modules: Sequence[nn.Module], batch: Any) -> list[_Call]:
    """How some modules are called in one forward."""
    found = [_Call() for _ in modules]

    def see(seen: _Call) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> None:
            seen.times += 1
            named = ((name, value) for name, value in kwargs.items() if isinstance(value, Tensor))
            seen.keyword, given = ("", args[0]) if args else next(named, ("", None))
            first, rest = (output[0], output[1:]) if type(output) is tuple and output else (output, ())
            seen.rows, seen.nones = type(output) is tuple, len(rest)
            seen.odd = any(part is not None for part in rest)
            seen.given = given if isinstance(given, Tensor) and given.is_floating_point() else None
            seen.made = first if isinstance(first, Tensor) else None

        return hook

    run_watched(model, [(module, see(seen)) for module, seen in zip(modules, found, strict=True)], batch)
    return found


def _find_projections(model: nn.Module, captured: Capture, chains: Sequence[LayerChain]) -> None:
    """The projection that each layer adds last, if a map can be merged into it."""
    walker = Walker(model, captured, shared_parameters(model, captured))
    for layer in (layer for chain in chains for layer in chain.layers):
        layer.out = _projection(walker, captured, layer.path)


def _projection(walker: Walker, captured: Capture, path: str) -> Port | None:
    """The last linear op whose output a layer gives with sums alone behind it."""
    inside = [node for node, stack in captured.stacks.items() if any(step.path == path for step in stack)]
    within = set(inside)
    ends = [node for node in inside if any(user not in within for user in users(node)) and shape(node)]
    if not ends:
        return None
    end = max(ends, key=captured.order.__getitem__)
    found: list[fx.Node] = []
    seen, waiting = {end}, [end]
    while waiting:
        node = waiting.pop()
        if op_name(node) in ("linear", "addmm"):
            found.append(node)
        elif op_name(node) in _QUIET and not (op_name(node) == "add" and _scaled(node)):
            sources = [s for s in node.all_input_nodes if s in within and s not in seen]
            waiting += sources
            seen.update(sources)
    for node in sorted(found, key=captured.order.__getitem__, reverse=True):
        try:
            port, _ = walker.port(node, node, len(shape(node) or ()) - 1, output=True)
        except Dead:
            continue
        if len(users(node)) == 1 and port.dims == 0 and _plain(walker.model, port):
            return port
    return None


def _scaled(node: fx.Node) -> bool:
    """Whether a sum multiplies one side by a number."""
    return bool(node.kwargs.get("alpha", 1) != 1)


def _plain(model: nn.Module, port: Port) -> bool:
    module = model.get_submodule(port.module)
    return module._parameters.get("weight") is not None


def _failure(model: nn.Module, chain: LayerChain, batch: Any) -> str | None:
    """What shows that the code around a list takes no fewer layers; None if nothing does: tried on copies."""
    free_ones = chain.free
    middle = free_ones[len(free_ones) // 2]
    inputs = batches_of(batch)[0]
    trial = duplicate(model, CollapseError)
    try:
        skip_layers(trial, chain, [middle])
        expected = _outputs(trial, inputs)
    except Exception as error:  # whatever the model's own code raises
        return f"the code around it wants something of the layer ({first_line(error)})"
    closed = duplicate(trial, CollapseError)
    try:
        close_up(closed)
        found = _outputs(closed, inputs)
    except Exception as error:
        return f"the code around it takes no shorter list ({first_line(error)})"
    for a, b in zip(expected, found, strict=False):
        if a.shape != b.shape:
            return "the code around it takes no shorter list (an output has another shape)"
        if a.is_floating_point() and a.numel():
            scale = a.abs().max().clamp_min(torch.finfo(a.dtype).tiny)
            if not float((a - b).abs().max() / scale) <= _TOLERANCES.get(a.dtype, 5e-2):
                return "the code around it computes something else with a shorter list"
    return None


def _outputs(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    with evaluating(model), untouched(model):
        return tensors_of(call("model", model, inputs))
