"""The nonlinear units of a captured graph: every activation, and which of its channels are nonlinear now.

Gates, partial activations and masked activations count as one unit each. The activations inside do not count again.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from linearize import checks
from linearize.gating.gate import ChannelGate
from linearize.graph.activations import Activation, find_activations
from linearize.graph.capture import CONSTANT, Capture, Inputs, fake_inputs, normalize_inputs, shape, users
from linearize.graph.channels import channel_axes
from linearize.graph.discover import _locate
from linearize.graph.stacks import Call
from linearize.sites.record import record_of
from linearize.surgery.layers import BlendedActivation, MaskedActivation, PartialActivation

_GATES = (ChannelGate, PartialActivation, MaskedActivation, BlendedActivation)
GateLike = ChannelGate | PartialActivation | MaskedActivation | BlendedActivation


@dataclass(frozen=True)
class Unit:
    """One evaluation of an activation in the graph.

    Attributes:
        name: name of its site; where a module runs several times, all its evaluations share the name.
        activation: what it is called, in lower case.
        source, output: the node it reads and the node that holds its result.
        nodes: the ops it is made of.
        channels: number of channels; 1 if their axis is not known.
        axis: the channel axis, counted from the end; None if it is not known.
        gate: the module that tells which channels are linear; None where all are nonlinear.
    """

    name: str
    activation: str
    source: fx.Node
    output: fx.Node
    nodes: tuple[fx.Node, ...]
    channels: int
    axis: int | None
    gate: GateLike | None = None

    @property
    def gated_unit(self) -> bool:
        """True for the gate factor of a gated linear unit: where it is linear it is a constant."""
        return isinstance(self.gate, ChannelGate) and self.gate.gated_unit

    def nonlinear(self) -> Tensor:
        """Which channels are nonlinear now: bool (C,) on the CPU."""
        gate = self.gate
        if isinstance(gate, PartialActivation):
            return torch.arange(self.channels) < gate.keep
        if isinstance(gate, ChannelGate) and not gate.alpha.is_meta:
            return ~gate.linear.cpu()
        if isinstance(gate, MaskedActivation) and not gate.linear.is_meta:
            return ~gate.linear.cpu()
        if isinstance(gate, BlendedActivation) and not gate.alpha.is_meta:
            return gate.alpha.cpu() < 1
        return torch.ones(self.channels, dtype=torch.bool)


def find_units(model: nn.Module, captured: Capture) -> tuple[Unit, ...]:
    """All nonlinear units of a captured model, in order of execution."""
    axes = channel_axes(captured.graph)
    gated = _gated(model, captured)
    inside = {node for unit in gated for node in unit.nodes}
    activations = [a for a in find_activations(model, captured) if a.output not in inside]
    calls = Counter((a.owner, _base(a)) for a in activations)
    seen: Counter[tuple[Call, str]] = Counter()
    units = list(gated)
    for activation in activations:
        key = (activation.owner, _base(activation))
        name = _locate(model, activation, seen[key], calls[key]).name
        seen[key] += 1
        sizes, axis = shape(activation.output) or (), axes.get(activation.source)
        known = axis is not None and axis < len(sizes)
        units.append(
            Unit(
                name=name,
                activation=activation.name,
                source=activation.source,
                output=activation.output,
                nodes=activation.nodes,
                channels=sizes[axis] if known and axis is not None else 1,
                axis=axis - len(sizes) if known and axis is not None else None,
            )
        )
    return tuple(sorted(units, key=lambda unit: captured.order[unit.output]))


def _base(activation: Activation) -> str:
    return activation.call.path if activation.call is not None else activation.name


def _gated(model: nn.Module, captured: Capture) -> list[Unit]:
    """The units that a module of linearize's own stands for: the outermost one around each op."""
    grouped: dict[Call, list[fx.Node]] = {}
    held: dict[str, GateLike] = {path: m for path, m in model.named_modules() if isinstance(m, _GATES)}
    for node, stack in captured.stacks.items():
        call = next((call for call in stack if call.path in held), None)
        if call is not None:
            grouped.setdefault(call, []).append(node)
    units: list[Unit] = []
    for call, nodes in grouped.items():
        members = set(nodes)
        outside = [s for n in nodes for s in n.all_input_nodes if s not in members and s.op != "get_attr"]
        sources = [s for s in outside if CONSTANT not in s.meta]
        results = [n for n in nodes if CONSTANT not in n.meta and any(user not in members for user in users(n))]
        if len(set(sources)) != 1 or len(results) != 1:
            continue
        gate, sizes = held[call.path], shape(results[0]) or ()
        name = type(gate.activation).__name__.lower() if isinstance(gate.activation, nn.Module) else "activation"
        channels = sizes[gate.axis] if -len(sizes) <= gate.axis < 0 else 1
        site = gate.site if isinstance(gate, ChannelGate) else None
        if site is not None:
            name = site.activation
        known = site.name if site is not None else call.path
        units.append(Unit(known, name, sources[0], results[0], tuple(nodes), channels, gate.axis, gate))
    return units


def inputs_of(model: nn.Module, example_inputs: object) -> Inputs:
    """Example inputs in one form: those given, else those stored in a rewritten model, else those of its library.

    Raises:
        CaptureError: none were given, and none are known.
    """
    if example_inputs is not None:
        return normalize_inputs(example_inputs)
    record = record_of(model)
    if record is not None and record.inputs is not None:
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        args, kwargs = record.inputs
        return fake_inputs((args, kwargs)) if device.type == "meta" else zeros_like_inputs((args, kwargs), device)
    from linearize import zoo

    return zoo.example_inputs(model)


def zeros_like_inputs(inputs: Inputs, device: torch.device) -> Inputs:
    """The same inputs with zeros on a device, made from their shapes."""
    made: Inputs = pytree.tree_map_only(Tensor, lambda t: torch.zeros(t.shape, dtype=t.dtype, device=device), inputs)
    return made


def check_weighting(weighting: str) -> bool:
    """True for "normalized", False for "unnormalized".

    Raises:
        UsageError: it is neither.
    """
    return checks.choice("weighting", weighting, ("normalized", "unnormalized")) == "normalized"
