"""Constant affine maps per channel in a captured graph: norms with fixed statistics, scales and shifts by parameters.

Each operation is one map. It can be folded away in two ways. If its module does nothing else, the module is removed.
Otherwise its parameter becomes neutral, a one or a zero of size 1, which fits any number of channels.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import fx, nn

from linearize.algebra.constants import OPERATIONS, Expression, expression_of
from linearize.graph.capture import CONSTANT, Capture, shape, users
from linearize.graph.channels import motion_of
from linearize.graph.motion import argument
from linearize.graph.ops import RESHAPES, op_name
from linearize.graph.problem import Dead
from linearize.sites.site import Fold

_PASSES = RESHAPES | {"permute", "transpose"}  # of a constant with one value per channel: they change nothing
_QUIET = frozenset(("view reshape flatten _unsafe_view contiguous dropout to clone detach alias").split())


@dataclass(frozen=True)
class Folder:
    """Says which constant map an op computes, and how it can be folded away."""

    model: nn.Module
    captured: Capture
    shared: dict[str, str]

    def fold(self, node: fx.Node, source: fx.Node, axis: int) -> Fold:
        """The map from `source` to `node`, whose channels lie on `axis`.

        Raises:
            Dead: its constants are shared or not known, or it cannot be taken out of the code around it.
        """
        channels = (shape(node) or ())[axis]
        if op_name(node) == "batch_norm":
            names = ("weight", "bias", "running_mean", "running_var")
            weight, bias, mean, var = (self._parameter(argument(node, name)) for name in names)
            made = Fold("", (), weight, bias, mean, var, float(argument(node, "eps")))
        else:
            scale, shift = self._scale_shift(node, source, channels)
            made = Fold("", scale=scale, shift=shift)
        path = self.captured.path(node)
        children = self._remains(node, path)
        if children is not None:
            return self._checked(node, path, replace(made, module=path, children=children))
        self._check_times(path)
        neutral = self._neutral(node, source)
        return self._checked(node, path, replace(made, module=neutral[0][0].rpartition(".")[0], neutral=neutral))

    def goes(self, node: fx.Node) -> bool:
        """True if the operation is part of a module that can be removed as a whole."""
        return self._remains(node, self.captured.path(node)) is not None

    def _remains(self, node: fx.Node, path: str) -> tuple[str, ...] | None:
        """The children that stay if the module of an op is taken away; None if it does other things, too."""
        own = [n for n in self.captured.siblings(node) if CONSTANT not in n.meta]
        if not path or self.captured.times.get(path, 1) > 1:
            return None
        first, last = node, None
        for op in own:
            sources = [s for s in op.all_input_nodes if CONSTANT not in s.meta]
            if len(sources) != 1 or (last is not None and (sources[0] is not last or len(users(last)) != 1)):
                return None
            if op_name(op) not in _QUIET and not _is_fold(op, sources[0]):
                return None
            first, last = (sources[0] if last is None else first), op
        return self._children(path, own[-1]) if shape(first) == shape(own[-1]) else None

    def _checked(self, node: fx.Node, path: str, fold: Fold) -> Fold:
        self._check_times(path)
        for name in self._behind(node):
            if name in self.shared:
                raise Dead(f"{name} is shared with {self.shared[name]}")
        return fold

    def _check_times(self, path: str) -> None:
        if path and self.captured.times.get(path, 1) > 1:
            raise Dead(f"{path} is called {self.captured.times[path]} times")

    def _behind(self, node: fx.Node) -> list[str]:
        """The parameters and buffers that the constants of an op are made of."""
        found: list[str] = []
        waiting = [source for source in node.all_input_nodes if CONSTANT in source.meta]
        while waiting:
            source = waiting.pop()
            found += [self.captured.parameters[source]] if source in self.captured.parameters else []
            waiting += source.all_input_nodes
        return found

    def _scale_shift(self, node: fx.Node, source: fx.Node, channels: int) -> tuple[Any, Any]:
        """Scale and shift of an elementwise op; None for 1 and for 0."""
        name, args, kwargs = op_name(node), node.args, node.kwargs

        def value(index: int) -> Expression:
            return self._expression(args[index], channels)

        if name == "neg":
            return -1.0, None
        if name == "addcmul":
            factor = float(kwargs.get("value", 1))  # type: ignore[arg-type]
            if args[0] is source:
                return None, _times(("mul", value(1), value(2)), factor)
            return _times(value(2 if args[1] is source else 1), factor), value(0)
        first = args[0] is source
        other = value(1 if first else 0)
        if name == "mul":
            return other, None
        if name == "div":
            return ("reciprocal", other), None
        alpha = float(args[2] if len(args) > 2 else kwargs.get("alpha", 1))  # type: ignore[arg-type]
        if name == "rsub":  # other - alpha * x, if x comes first
            return (-alpha, other) if first else (None, _times(other, -alpha))
        sign = -alpha if name == "sub" else alpha
        return (None, _times(other, sign)) if first else (sign, other)

    def _expression(self, value: Any, channels: int) -> Expression:
        """What a constant operand is made of.

        Raises:
            Dead: of something else than numbers, parameters and buffers, or not one value per channel.
        """
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
        sizes = shape(value)
        if not isinstance(value, fx.Node) or sizes is None or _numel(sizes) not in (1, channels):
            raise Dead("a constant between the maps is no parameter or buffer")
        if value in self.captured.parameters:
            return self.captured.parameters[value]
        name, inner = op_name(value), _unmoved(value)
        if inner is not None:
            return self._expression(inner, channels)
        if value.op == "call_function" and name == "rsub" and not value.kwargs and len(value.args) == 2:
            return ("sub", self._expression(value.args[1], channels), self._expression(value.args[0], channels))
        if value.op == "call_function" and name in OPERATIONS and not value.kwargs:
            try:
                return expression_of((name, *(self._expression(operand, channels) for operand in value.args)))
            except ValueError as odd:  # an operation with options, or too many of them
                raise Dead("a constant between the maps is no parameter or buffer") from odd
        raise Dead("a constant between the maps is no parameter or buffer")

    def _parameter(self, value: Any) -> str | None:
        """The tensor of a norm, by name."""
        while (inner := _unmoved(value)) is not None:
            value = inner
        if value is None:
            return None
        if value not in self.captured.parameters:
            raise Dead("a constant between the maps is no parameter or buffer")
        return self.captured.parameters[value]

    def _neutral(self, node: fx.Node, source: fx.Node) -> tuple[tuple[str, float], ...]:
        """The parameters to set, and to what, so that the op does nothing.

        Raises:
            Dead: it works with a number that stands in the code, or with something computed.
        """
        name, where = op_name(node), self.captured.path(node) or "the model's own forward"
        by_one = {"mul": {0: 1.0, 1: 1.0}, "div": {1: 1.0}, "add": {0: 0.0, 1: 0.0}, "sub": {1: 0.0}}
        values = {"addcmul": {0: 0.0, 1: 1.0, 2: 1.0}, **by_one}.get(name, {})
        found = []
        for index, operand in enumerate(node.args[: 3 if name == "addcmul" else 2]):
            if operand is source:
                continue
            try:
                parameter = self._parameter(operand)
            except Dead:
                parameter = None
            if parameter is None or index not in values or (name == "addcmul" and node.args[0] is source):
                raise Dead(f"a constant map is computed in the code of {where}")
            if node.args[0] is not source and name == "add" and (len(node.args) > 2 or node.kwargs):
                raise Dead(f"a constant map is computed in the code of {where}")
            owner, _, attribute = parameter.rpartition(".")
            module = self.model.get_submodule(owner)
            if attribute not in module._parameters and attribute not in module._buffers:
                raise Dead(f"a constant map is computed in the code of {where}")
            if self._read_twice(operand):
                raise Dead(f"{parameter} has another use in {where}")
            found.append((parameter, values[index]))
        if not found or name == "batch_norm":
            raise Dead(f"a constant map is computed in the code of {where}")
        return tuple(found)

    def _read_twice(self, operand: Any) -> bool:
        """True if a parameter, or a view of it on the way to an op, is read by another op, too."""
        while operand is not None:
            if len(users(operand)) > 1:
                return True
            operand = _unmoved(operand)
        return False

    def _children(self, path: str, last: fx.Node) -> tuple[str, ...] | None:
        """The children that run after the maps, one after the other; None if they do something else."""
        ran: list[str] = []
        for child in sorted(self._child_ops(path), key=lambda ops: self.captured.order[ops[1][0]]):
            name, ops = child
            if last not in ops[0].all_input_nodes or len(users(last)) != 1:
                return None
            ran.append(name)
            last = ops[-1]
        return tuple(ran)

    def _child_ops(self, path: str) -> list[tuple[str, list[fx.Node]]]:
        grouped: dict[str, list[fx.Node]] = {}
        for call, ops in self.captured.ops.items():
            varying = [op for op in ops if CONSTANT not in op.meta]
            if call.path.startswith(f"{path}.") and varying:
                grouped.setdefault(call.path[len(path) + 1 :].split(".")[0], []).extend(varying)
        return list(grouped.items())


def _unmoved(value: Any) -> fx.Node | None:
    """What a view or a cast of a constant with one value per channel was made from; None if the op does more."""
    if not isinstance(value, fx.Node) or value.op != "call_function" or not isinstance(value.args[0], fx.Node):
        return None
    inner, name = value.args[0], op_name(value)
    before, after = shape(inner), shape(value)
    whole = name == "slice" and before is not None and after is not None and _numel(before) == _numel(after)
    return inner if whole or name in _PASSES else None


def _times(expression: Expression, factor: float) -> Expression:
    return expression if factor == 1 else ("mul", expression, factor)


def _numel(sizes: tuple[int, ...]) -> int:
    total = 1
    for size in sizes:
        total *= size
    return total


def _is_fold(node: fx.Node, source: fx.Node) -> bool:
    return any(motion_of(node, source, axis).fold for axis in range(len(shape(source) or ())))
