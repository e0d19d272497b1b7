"""What each operation does to paths: one rule per kind of operation, in the table that `Spreader` uses.

A path runs through channels, not through positions or samples. The rules are:

- dense maps connect every input channel to every output channel; convolutions do so within their groups;
- views, slices, permutations and splits move each element;
- sums, products, maxima and other functions of several tensors are merges of branches. A product is one, because
  `d(uv) = u dv + v du`: a change of the input travels along both factors;
- norms and softmax pass every channel through; their statistics are not units;
- attention passes every channel of the values through and mixes tokens; queries and keys are only weights;
- pooling and other reductions over positions pass channels through; over channels they are dense;
- any other operation connects everything with everything, and is reported.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx

from linearize.analysis.flow import Flow, average, concatenate, contract, gathered, meet, ranked, repeated, source
from linearize.analysis.op_kinds import _ATTENTION, _CONSTANTS, _MERGES, _MOVES, _REDUCTIONS, _SOFT, arguments
from linearize.graph.capture import shape
from linearize.graph.ops import op_name

State = Flow | list[Flow | None] | None


@dataclass
class Rules:
    """Applies the rules; `states` holds what is known about every node so far.

    Attributes:
        axes: the channel axis of every node for which it is known.
        normalized: which weighting.
        opaque: the ops that no rule knew, in order.
    """

    axes: dict[fx.Node, int]
    normalized: bool
    states: dict[fx.Node, State] = field(default_factory=dict)
    opaque: list[str] = field(default_factory=list)

    def apply(self, node: fx.Node) -> State:
        """The flows that an operation makes of those of its operands."""
        name = op_name(node)
        if name == "getitem":
            return self._getitem(node)
        if name in _CONSTANTS:
            return None
        operands = [n for n in node.all_input_nodes if self.flow(n) is not None]
        if not operands:
            return source(len(shape(node) or ())) if name == "embedding" and _reads_input(node) else None
        if name in _MERGES or name in _SOFT:
            return self._merge(node, name, operands)
        if name in _MOVES:
            return self._move(node, operands)
        rule = self._rule(name)
        return self._opaque(node, operands) if rule is None else rule(node)

    def flow(self, node: Any) -> Flow | None:
        """The flow of a node that holds one tensor; None if no path leads there."""
        state = self.states.get(node) if isinstance(node, fx.Node) else None
        return state if isinstance(state, Flow) else None

    def _rule(self, name: str) -> Callable[[fx.Node], State] | None:
        if name.startswith(("conv1d", "conv2d", "conv3d", "conv_transpose")):
            return self._convolution
        if "pool" in name or "upsample" in name or name == "grid_sampler":
            return self._pool
        if name in _REDUCTIONS:
            return self._reduction
        if name in _ATTENTION:
            return self._attention
        table: dict[str, Callable[[fx.Node], State]] = {
            "linear": self._linear,
            "cat": self._cat,
            "concat": self._cat,
            "stack": self._stack,
            "pad": self._pad,
            "constant_pad_nd": self._pad,
            "einsum": self._einsum,
            **dict.fromkeys(("mm", "matmul", "bmm"), self._product),
            **dict.fromkeys(("addmm", "baddbmm"), self._sum_product),
            **dict.fromkeys(("reflection_pad1d", "reflection_pad2d", "replication_pad2d"), self._pool),
        }
        return table.get(name)

    def _merge(self, node: fx.Node, name: str, operands: Sequence[fx.Node]) -> Flow | None:
        rank = len(shape(node) or ())
        skipped = arguments(node).get("condition" if name == "where" else "mask")
        flows = [ranked(self._of(n), rank) for n in operands if n is not skipped]
        if not flows:
            return None
        merged = meet(flows, normalized=self.normalized)
        return replace(merged, soft=merged.soft or name in ("softmax", "_softmax", "_safe_softmax"))

    def _of(self, node: fx.Node) -> Flow:
        flow = self.flow(node)
        return flow if flow is not None else source(len(shape(node) or ()))

    def _getitem(self, node: fx.Node) -> State:
        state = self.states.get(node.args[0])  # type: ignore[arg-type]
        if isinstance(state, list):
            index = node.args[1]
            return state[index] if isinstance(index, int) and index < len(state) else None
        sizes = shape(node)
        if state is None or sizes is None or not node.meta["val"].is_floating_point():
            return None
        return state if len(sizes) == len(state.grid) else ranked(self._mixed(state, None, None), len(sizes))

    def _move(self, node: fx.Node, operands: Sequence[fx.Node]) -> State:
        """Views and permutations: carried out on the numbers of the elements, whatever their arguments mean."""
        operand = operands[0]
        results: Any = node.meta.get("val")
        flow = self._of(operand)
        values = list(results) if isinstance(results, (list, tuple)) else [results]
        if flow.uniform:
            made: list[Flow | None] = [ranked(flow, value.dim()) for value in values]
        else:
            try:
                index = torch.arange(flow.log.numel()).view(flow.grid).expand(shape(operand) or flow.grid)
                args, kwargs = fx.map_arg(
                    (node.args, node.kwargs),
                    lambda n: index if n is operand else torch.zeros(()).expand(shape(n) or ()),
                )
                moved: Any = node.target(*args, **kwargs)  # type: ignore[operator]
                parts = list(moved) if isinstance(moved, (list, tuple)) else [moved]
                made = [gathered(flow, part) for part in parts]
            except (RuntimeError, TypeError, ValueError, IndexError):
                return self._opaque(node, operands)
        return made if isinstance(results, (list, tuple)) else made[0]

    def _linear(self, node: fx.Node) -> State:
        operand, weight = node.args[0], self.flow(node.args[1])
        flows = [] if weight is None else [self._uniform(node.args[1], node)]
        sizes = shape(operand) or (1,)
        if self.flow(operand) is not None:
            flows.append(contract(self._of(operand), -1, sizes[-1]))  # type: ignore[arg-type]
        return meet(flows, normalized=self.normalized) if flows else None

    def _product(self, node: fx.Node) -> State:
        return self._matmul(node, node.args[0], node.args[1])

    def _sum_product(self, node: fx.Node) -> State:
        added, product = self.flow(node.args[0]), self._matmul(node, node.args[1], node.args[2])
        flows = [flow for flow in (added, product) if flow is not None]
        return meet([ranked(f, len(shape(node) or ())) for f in flows], normalized=self.normalized) if flows else None

    def _matmul(self, node: fx.Node, left: Any, right: Any) -> Flow | None:
        """A dense map, a product of two branches, or attention weights that mix the tokens of the values."""
        a, b = self.flow(left), self.flow(right)
        if (a is None or b is None) and len(shape(left) or ()) < 2:
            return self._opaque(node, [n for n, flow in ((left, a), (right, b)) if flow is not None])
        if a is not None and b is not None and a.soft != b.soft:  # attention: the other one holds the values
            flow, axis = (b, -2) if a.soft else (a, -1)
            return ranked(replace(average(flow, [len(flow.grid) + axis]), soft=False), len(shape(node) or ()))
        flows = []
        if a is not None:
            flows.append(contract(a, -1, (shape(left) or (1,))[-1]))
        if b is not None:
            if len(b.grid) < 2:
                return self._opaque(node, [right])
            flows.append(contract(b, -2, (shape(right) or (1, 1))[-2]))
        rank = len(shape(node) or ())
        return meet([ranked(f, rank) for f in flows], normalized=self.normalized) if flows else None

    def _einsum(self, node: fx.Node) -> State:
        """Indices that are summed over are contracted; between attention weights and values they are tokens."""
        equation, operands = str(node.args[0]).replace(" ", ""), list(node.args[1])  # type: ignore[arg-type]
        flows = [self.flow(n) for n in operands]
        if "." in equation or "->" not in equation:
            return self._opaque(node, [n for n, f in zip(operands, flows, strict=True) if f is not None])
        inputs, output = equation.split("->")
        attention = any(f is not None and f.soft for f in flows) and any(f is not None and not f.soft for f in flows)
        made: list[Flow] = []
        for letters, operand, flow in zip(inputs.split(","), operands, flows, strict=True):
            if flow is None or (attention and flow.soft):
                continue
            for axis, letter in enumerate(letters):
                if letter not in output:
                    sizes = shape(operand) or ()
                    flow = average(flow, [axis]) if attention else contract(flow, axis, sizes[axis])  # noqa: PLW2901
            order = [letters.index(letter) for letter in output if letter in letters]
            rest = [axis for axis in range(len(letters)) if axis not in order]
            grid = [flow.grid[letters.index(letter)] if letter in letters else 1 for letter in output]
            log = flow.log.permute(*order, *rest).reshape(grid)
            made.append(Flow(flow.lengths.permute(*order, *rest, -1).reshape(*grid, -1), log))
        return meet(made, normalized=self.normalized) if made else None

    def _convolution(self, node: fx.Node) -> State:
        given, sizes = arguments(node), shape(node) or ()
        dims = int(next(c for c in op_name(node) if c.isdigit()))
        axis, groups = len(sizes) - 1 - dims, int(given.get("groups", 1))
        flow = self.flow(given["input"])
        flows = [] if self.flow(given["weight"]) is None else [self._uniform(given["weight"], node)]
        if flow is not None:
            flow = average(flow, range(axis + 1, len(sizes)))
            flow = contract(flow, axis, (shape(given["input"]) or sizes)[axis], groups)
            flows.append(repeated(flow, axis, sizes[axis] // groups))
        return meet(flows, normalized=self.normalized) if flows else None

    def _pool(self, node: fx.Node) -> State:
        flow = self._of(node.all_input_nodes[0])
        name = op_name(node).replace("_with_indices", "").replace("_aa", "")
        dims = int(next((c for c in reversed(name) if c.isdigit()), "2"))
        return average(flow, range(max(0, len(flow.grid) - dims), len(flow.grid)))

    def _reduction(self, node: fx.Node) -> State:
        given, operand = arguments(node), node.all_input_nodes[0]
        flow, sizes = self._of(operand), shape(operand) or ()
        dims = given.get("dim")
        listed = list(range(len(sizes))) if dims is None or dims == [] else dims if isinstance(dims, list) else [dims]
        axes = sorted({int(d) % max(1, len(sizes)) for d in listed})
        if op_name(node) in ("max", "min") and isinstance(dims, fx.Node):
            return self._merge(node, "maximum", [n for n in node.all_input_nodes if self.flow(n) is not None])
        for axis in axes:
            if flow.grid[axis] > 1 or axis == self.axes.get(operand):
                flow = contract(flow, axis, sizes[axis])
        if not given.get("keepdim", False):
            kept = [a for a in range(len(sizes)) if a not in axes]
            grid = [flow.grid[a] for a in kept]
            flow = replace(flow, lengths=flow.lengths.reshape(*grid, -1), log=flow.log.reshape(grid))
        return replace(flow, soft=False)

    def _attention(self, node: fx.Node) -> State:
        given, sizes = arguments(node), shape(node)
        value = self.flow(given["value"])
        if value is None or (sizes is None and op_name(node) == "scaled_dot_product_attention"):
            return None
        flow = replace(average(value, [len(value.grid) - 2]), soft=False)
        heads = (shape(given["query"]) or (1,) * 4)[-3] if len(value.grid) > 2 else 1
        return repeated(flow, len(value.grid) - 3, heads // value.grid[-3]) if len(value.grid) > 2 else flow

    def _cat(self, node: fx.Node) -> State:
        given, sizes = arguments(node), shape(node) or ()
        parts: list[fx.Node] = [n for n in given["tensors"] if shape(n) != (0,)]
        axis = int(given.get("dim", 0)) % max(1, len(sizes))
        flows = [self.flow(n) for n in parts]
        known = self.axes.get(node)
        alike = all(flow is None or flow.grid[axis] == 1 for flow in flows)
        if known is not None and axis != known and alike and max((shape(n) or sizes)[axis] for n in parts) > 1:
            joined = [flow for flow in flows if flow is not None]  # positions side by side
            return meet(joined, normalized=self.normalized)
        pairs = [(flow, shape(n) or sizes) for flow, n in zip(flows, parts, strict=True)]
        return concatenate(pairs, axis, normalized=self.normalized)

    def _stack(self, node: fx.Node) -> State:
        given, sizes = arguments(node), shape(node) or ()
        axis = int(given.get("dim", 0)) % max(1, len(sizes))
        parts: list[tuple[Flow | None, tuple[int, ...]]] = []
        for n in given["tensors"]:
            flow = self.flow(n)
            if flow is not None:
                flow = replace(flow, lengths=flow.lengths.unsqueeze(axis), log=flow.log.unsqueeze(axis))
            parts.append((flow, (*sizes[:axis], 1, *sizes[axis + 1 :])))
        return concatenate(parts, axis, normalized=self.normalized)

    def _pad(self, node: fx.Node) -> State:
        """Padding adds channels that no path leads to; at the border of positions it changes nothing."""
        operand, amounts = node.all_input_nodes[0], list(arguments(node)["pad"])
        flow, sizes = self._of(operand), shape(operand) or ()
        index = torch.arange(flow.log.numel()).view(flow.grid)
        for place in range(len(amounts) // 2):
            axis = len(sizes) - 1 - place
            before, after = amounts[2 * place : 2 * place + 2]
            if (before or after) and (flow.grid[axis] > 1 or axis == self.axes.get(operand)):
                index = index.expand(*index.shape[:axis], sizes[axis], *index.shape[axis + 1 :])
                index = torch.nn.functional.pad(index, (0, 0) * place + (before, after), value=-1)
        return gathered(flow, index)

    def _uniform(self, operand: Any, node: fx.Node) -> Flow:
        return ranked(self._mixed(self._of(operand), self.axes.get(operand), shape(operand)), len(shape(node) or ()))

    def _mixed(self, flow: Flow, axis: int | None, sizes: tuple[int, ...] | None) -> Flow:
        """All channels mixed, all positions alike."""
        if axis is not None and sizes is not None and axis < len(flow.grid):
            flow = contract(flow, axis, sizes[axis])
        return replace(average(flow, range(len(flow.grid))), soft=False)

    def _opaque(self, node: fx.Node, operands: Sequence[fx.Node]) -> Flow:
        name = op_name(node)
        if name not in self.opaque:
            self.opaque.append(name)
        return meet([self._uniform(n, node) for n in operands], normalized=self.normalized)


def _reads_input(node: fx.Node) -> bool:
    """True if the indices of an embedding are no constants."""
    return any("linearize_constant" not in n.meta for n in node.all_input_nodes[1:])


__all__ = ["Rules", "State"]
