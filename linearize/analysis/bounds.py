"""Interval bounds: the range of values of each channel, for every input in a box.

The bounds are safe: any operation without a rule counts as unbounded, and each rounded sum is widened by more than its
rounding error. They hold for the function in exact arithmetic with the given (float64) weights.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from linearize.analysis.intervals import _EPS, _VALLEYS, Interval, Value, _usable, _valley
from linearize.analysis.op_kinds import arguments
from linearize.analysis.units import Unit
from linearize.gating.gate import ChannelGate
from linearize.graph.capture import CONSTANT, Capture, is_check
from linearize.graph.memory import memory_of
from linearize.graph.ops import constant, is_inplace, op_name

__all__ = ["bounds"]

_MOVES = frozenset(
    (
        "view reshape _unsafe_view flatten unflatten squeeze unsqueeze permute transpose t expand slice narrow select "
        "unbind chunk split split_with_sizes getitem roll flip clone contiguous alias detach to _to_copy dropout "
        "feature_dropout max_pool1d max_pool2d max_pool3d adaptive_max_pool1d adaptive_max_pool2d cat concat stack "
        "relu relu6 hardtanh clamp_min clamp_max movedim pixel_shuffle pixel_unshuffle repeat"
    ).split()
)
_AVERAGES = frozenset(
    (
        "avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d mean sum "
        "upsample_nearest2d upsample_bilinear2d"
    ).split()
)
_MONOTONE = frozenset("leaky_relu elu celu selu sigmoid tanh softplus hardsigmoid log_sigmoid softsign".split())
_MONOTONE_MODULES = frozenset(
    "relu relu6 hardtanh leakyrelu elu celu selu sigmoid tanh softplus hardsigmoid logsigmoid softsign".split()
)


def bounds(model: nn.Module, captured: Capture, units: Sequence[Unit], box: Sequence[Interval]) -> dict[fx.Node, Value]:
    """Bounds for the nodes of a captured model.

    Args:
        model: the float64 model that was captured.
        captured: its graph.
        units: its nonlinear units; gates among them are bounded as a whole.
        box: an interval for each floating input, in their order.

    Returns:
        An interval for each node that is bounded.
    """
    analysis = _Bounds(model, captured, {unit.output: unit for unit in units if isinstance(unit.gate, ChannelGate)})
    with torch.no_grad():
        return analysis.run(list(box))


@dataclass
class _Bounds:
    model: nn.Module
    captured: Capture
    gated: Mapping[fx.Node, Unit]
    constants: dict[fx.Node, Tensor] = field(default_factory=dict)
    known: dict[fx.Node, Value] = field(default_factory=dict)

    def run(self, box: list[Interval]) -> dict[fx.Node, Value]:
        inside = {n for unit in self.gated.values() for n in unit.nodes} - set(self.gated)
        for node in self.captured.graph.nodes:
            if node in self.captured.parameters:
                held = operator.attrgetter(self.captured.parameters[node])(self.model)
                self.constants[node] = held.detach()
            elif node.op == "placeholder" and CONSTANT not in node.meta:
                value = node.meta.get("val")
                if isinstance(value, Tensor) and value.is_floating_point() and box:
                    self.known[node] = box.pop(0)
            elif node.op == "call_function" and not is_check(node):
                self._call(node, inside)
        return self.known

    def _call(self, node: fx.Node, inside: set[fx.Node]) -> None:
        if CONSTANT in node.meta:
            if all(n in self.constants for n in node.all_input_nodes):
                self.constants[node] = self._run(node, self.constants)
            return
        if node in inside:
            return
        try:
            found = self._gate(self.gated[node]) if node in self.gated else self._bound(node)
        except (RuntimeError, TypeError, ValueError):  # an argument that the rule did not expect: not understood
            found = None
        if is_inplace(node):  # what shares the memory has changed, too
            for other in [other for other in self.known if memory_of(other) == memory_of(node)]:
                self.known[other] = None
            if isinstance(node.args[0], fx.Node):
                self.known[node.args[0]] = found
        if _usable(found):
            self.known[node] = found

    def _run(self, node: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
        fresh = is_inplace(node)
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: values[n].clone() if fresh else values[n])
        return node.target(*args, **kwargs)  # type: ignore[operator]

    def interval(self, node: Any) -> Interval | None:
        """The interval of a node. The interval of a constant has width 0."""
        if isinstance(node, fx.Node) and node in self.constants:
            value = self.constants[node].double()
            return Interval(value, value)
        found = self.known.get(node) if isinstance(node, fx.Node) else None
        return found if isinstance(found, Interval) else None

    def _bound(self, node: fx.Node) -> Value:
        name = op_name(node)
        if name in ("linear", "addmm", "mm", "matmul") or name.startswith(("conv1d", "conv2d", "conv3d")):
            return self._affine(node, name)
        if name in _MOVES:
            return self._ends(node)
        if name in ("pad", "constant_pad_nd"):
            return self._ends(node) if arguments(node).get("mode", "constant") == "constant" else None
        if name in _AVERAGES:
            found = self._ends(node)
            before = self.interval(node.all_input_nodes[0])
            if not isinstance(found, Interval) or before is None or arguments(node).get("dtype") is not None:
                return None
            terms = before.low.numel() / max(1, found.low.numel()) + 8
            most = before.size.max() * (terms if name == "sum" else 1)
            return found.widened(2 * terms * _EPS * most)
        if name in _MONOTONE:
            found = self._ends(node)
            return found.widened(8 * _EPS * (1 + found.size)) if isinstance(found, Interval) else None
        if name in _VALLEYS:
            box, ends = self.interval(node.all_input_nodes[0]), self._ends(node)
            return _valley(name, box, ends) if box is not None and isinstance(ends, Interval) else None
        if name in ("add", "sub", "mul", "div"):
            return self._arithmetic(node, name)
        return self._norm(node) if name == "batch_norm" else None

    def _ends(self, node: fx.Node) -> Value:
        """An op that rises with its inputs: its values at the ends."""
        if op_name(node) == "getitem":
            parts, index = self.known.get(node.args[0]), node.args[1]  # type: ignore[arg-type]
            return parts[index] if isinstance(parts, list) and isinstance(index, int) else None
        held = {n: self.interval(n) for n in node.all_input_nodes}
        if any(value is None for value in held.values()):
            return None
        low = self._run(node, {n: value.low for n, value in held.items() if value is not None})
        high = self._run(node, {n: value.high for n, value in held.items() if value is not None})
        if isinstance(low, (list, tuple)):
            return [Interval(a, b) for a, b in zip(low, high, strict=True)]
        return Interval(low, high)

    def _affine(self, node: fx.Node, name: str) -> Interval | None:
        """Center and radius: `W c + b` and `|W| r`, with room for the rounding of both."""
        given = arguments(node)
        x, w, b = (
            (given["mat1"], given["mat2"], given["self"])
            if name == "addmm"
            else (given["self"], given.get("mat2", given.get("other")), None)
            if name in ("mm", "matmul")
            else (given["input"], given["weight"], given.get("bias"))
        )
        box, weight = self.interval(x), self.constants.get(w) if isinstance(w, fx.Node) else None
        bias = self.constants.get(b) if isinstance(b, fx.Node) else None
        if box is None or x in self.constants or weight is None or (b is not None and bias is None):
            return None
        if name == "addmm" and (given.get("alpha", 1) != 1 or given.get("beta", 1) != 1):
            return None
        center, radius = (box.low + box.high) / 2, (box.high - box.low) / 2

        def run(value: Tensor, matrix: Tensor, shift: Tensor | None) -> Tensor:
            if name in ("addmm", "mm", "matmul"):
                out: Tensor = value @ matrix
                return out if shift is None else out + shift
            made: Tensor = node.target(**{**given, "input": value, "weight": matrix, "bias": shift})  # type: ignore[operator]
            return made

        middle, spread = run(center, weight, bias), run(radius, weight.abs(), None)
        terms = weight.numel() / max(
            1, min(weight.shape[0], weight.shape[-1] if weight.dim() == 2 else weight.shape[0])
        )
        room = run(box.size, weight.abs(), None if bias is None else bias.abs())
        return Interval(middle - spread, middle + spread).widened(4 * (terms + 8) * _EPS * room)

    def _arithmetic(self, node: fx.Node, name: str) -> Interval | None:
        given = arguments(node)
        if given.get("alpha", 1) != 1 or given.get("rounding_mode") is not None:
            return None
        ends: list[Interval] = []
        for value in node.args[:2]:
            if isinstance(value, (int, float)):
                held: Interval | None = Interval(
                    torch.tensor(float(value)).double(), torch.tensor(float(value)).double()
                )
            else:
                held = self.interval(value)
            if held is None:
                return None
            ends.append(held)
        a, b = ends
        if name == "add":
            found = Interval(a.low + b.low, a.high + b.high)
        elif name == "sub":
            found = Interval(a.low - b.high, a.high - b.low)
        else:
            if name == "div":
                if not bool((b.low == b.high).all()) or bool((b.low == 0).any()):
                    return None
                corners = [a.low / b.low, a.high / b.low]
            else:
                corners = [x * y for x in (a.low, a.high) for y in (b.low, b.high)]
            stacked = torch.stack(torch.broadcast_tensors(*corners))
            found = Interval(stacked.amin(0), stacked.amax(0))
        return found.widened(4 * _EPS * found.size)

    def _norm(self, node: fx.Node) -> Interval | None:
        given = arguments(node)
        box = self.interval(given["input"])
        names = ("weight", "bias", "running_mean", "running_var")
        if (
            box is None
            or given.get("training")
            or any(constant(given[n]) is None for n in names if given[n] is not None)
        ):
            return None
        w, b, mean, var = (None if given[n] is None else self.constants.get(given[n]) for n in names)
        if mean is None or var is None:
            return None
        sizes = (1, -1, *(1,) * (box.low.dim() - 2))
        scale = (torch.ones_like(mean) if w is None else w) / torch.sqrt(var + given["eps"])
        shift = torch.zeros_like(mean) if b is None else b
        scale, shift, mean = (t.double().view(sizes) for t in (scale, shift, mean))
        ends = torch.stack([(box.low - mean) * scale + shift, (box.high - mean) * scale + shift])
        room = (box.size + mean.abs()) * scale.abs() + shift.abs()
        return Interval(ends.amin(0), ends.amax(0)).widened(16 * _EPS * room)

    def _gate(self, unit: Unit) -> Interval | None:
        """`(1 - a) act(x) + a (slope x + intercept)`, both parts bounded apart."""
        gate, box = unit.gate, self.interval(unit.source)
        if not isinstance(gate, ChannelGate) or box is None:
            return None
        sizes = (-1, *(1,) * (-1 - gate.axis))
        a = torch.where(gate.frozen, torch.ones_like(gate.alpha), gate.alpha).detach().double().view(sizes)
        slope, intercept = (t.double().view(sizes) for t in (gate.slope, gate.intercept))
        ends = torch.stack([slope * box.low + intercept, slope * box.high + intercept])
        line = Interval(ends.amin(0), ends.amax(0)).widened(8 * _EPS * (slope.abs() * box.size + intercept.abs()))
        act = self._activation(gate.activation, unit.activation, box)
        if act is None:
            return line if bool((a == 1).all()) else None
        mixed = Interval((1 - a) * act.low + a * line.low, (1 - a) * act.high + a * line.high)
        partly = (a > 0) & (a < 1)
        room = torch.where(partly, 8 * _EPS * (act.size + line.size), torch.zeros_like(act.low))
        return mixed.widened(room)

    def _activation(self, module: nn.Module, name: str, box: Interval) -> Interval | None:
        name = name.replace("_", "")
        low, high = module(box.low), module(box.high)
        if name in _MONOTONE_MODULES:
            exact = name in ("relu", "relu6", "hardtanh")
            found = Interval(low, high)
            return found if exact else found.widened(8 * _EPS * (1 + found.size))
        if name in _VALLEYS:
            return _valley(name, box, Interval(low, high))
        if name == "prelu" and all(bool((p >= 0).all()) for p in module.parameters()):
            return Interval(low, high).widened(8 * _EPS * torch.maximum(low.abs(), high.abs()))
        return None
