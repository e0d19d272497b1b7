"""Walk from an activation to the linear maps around it, by the rules of the channel table."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, fx, nn

from linearize.graph.capture import CONSTANT, Capture, shape, users
from linearize.graph.channels import motion_of
from linearize.graph.folds import Folder
from linearize.graph.motion import Motion, argument
from linearize.graph.ops import constant, op_name
from linearize.graph.problem import Dead
from linearize.graph.uses import Uses, Way
from linearize.sites.site import Fold, Port
from linearize.tensors import QUANTISE_LATER, held, meddler, oddity, quantised_part

_LINEAR = {"linear": "linear", "addmm": "linear", "conv1d": "conv1d", "conv2d": "conv2d", "conv3d": "conv3d"}
_STILL = frozenset(("dropout contiguous clone alias detach to").split())
_PARTS = frozenset(("chunk split split_with_sizes tensor_split unsafe_split").split())  # getitem says which part
_AROUND = frozenset(
    ("view reshape flatten transpose permute _unsafe_view contiguous").split()
)  # inside the module of a linear map


@dataclass
class Trail:
    """Where a walk from an activation back to its producer ended, and the nodes that it came through."""

    port: Port
    node: fx.Node
    folds: tuple[Fold, ...]
    direct: bool
    visited: tuple[fx.Node, ...]


@dataclass(frozen=True)
class Walker:
    """A captured model and which of its parameters are used in more than one place."""

    model: nn.Module
    captured: Capture
    shared: dict[str, str]

    @property
    def folder(self) -> Folder:
        """The object that finds the constant maps in between."""
        return Folder(self.model, self.captured, self.shared)

    def back(self, node: fx.Node, axis: int, *, packed: bool = False) -> Trail:
        """From a node whose channels lie on `axis` to the linear map that produced them.

        With `packed`, the node may be one of several slices of that map's output.

        Raises:
            Dead: there is no such map, or something in between that cannot be followed.
        """
        folds: list[Fold] = []
        rows: tuple[int, int] | None = None
        direct, start = True, node
        visited: list[fx.Node] = []
        while True:
            visited.append(node)
            if op_name(node) in _LINEAR and node.op == "call_function":
                port, into = self.port(node, node, axis, output=True)
                if rows is not None:
                    port = replace(port, start=rows[0], stop=rows[1])
                if into is not start:  # who reads the start is the caller's question
                    self._alone(into, packed=rows is not None)
                return Trail(port, node, tuple(reversed(folds)), direct, tuple(visited))
            if node.op != "call_function":
                raise Dead("its input is an input of the model")
            if node in self.captured.calls and self._inside_linear(node):
                node, axis = self._through_linear(node, axis)
                continue
            source, before, motion = self._step_back(node, axis)
            where = self._where(node)
            if motion.fold and not (motion.uniform and not self.folder.goes(node)):
                if rows is not None:
                    raise Dead(f"a constant map acts on a slice of the channels ({where})")
                folds.append(self.folder.fold(node, source, axis))
            elif not motion.steady:
                raise Dead(f"between producer and activation, {op_name(node)} scales or pads ({where})")
            elif motion.rows is not None and (not packed or rows is not None):
                raise Dead(f"only a part of what its producer puts out is activated ({where})")
            else:
                rows = motion.rows or rows
                direct = direct and _stays(node, motion)
            if rows is None:
                self._alone(source, packed=False)
            node, axis = source, before

    def _step_back(self, node: fx.Node, axis: int) -> tuple[fx.Node, int, Motion]:
        sources = [s for s in node.all_input_nodes if CONSTANT not in s.meta and constant(s) is None]
        if len(sources) != 1:
            what = "a sum or product of branches" if len(sources) > 1 else "a constant"
            what = "a concatenation of branches" if op_name(node) == "cat" else what
            where = self._where(node)
            if _is_adapter(self.model.get_submodule(self.captured.path(node))):
                raise Dead(f"{where} has an adapter beside its weight: merge it first (peft: merge_and_unload())")
            raise Dead(f"its input is {what} ({op_name(node)} in {where})")
        source = sources[0]
        sizes = shape(source) or shape_of_list(source)
        if sizes is None:
            raise Dead(f"{op_name(node)} is not in the channel table ({self._where(node)})")
        last: Motion | None = None
        for candidate in range(len(sizes)):
            motion = motion_of(node, source, candidate)
            if motion.axis == axis:
                if motion.reason is None:
                    return source, candidate, motion
                last = motion
        reason = last.reason if last is not None else motion_of(node, source, 0).reason
        reason = reason or f"{op_name(node)} does not keep the channels on one axis"
        raise Dead(f"between producer and activation, {reason} ({self._where(node)})")

    def _alone(self, node: fx.Node, *, packed: bool) -> None:
        """A map can only be changed if nothing else reads what it puts out."""
        if len(users(node)) > 1 and not packed:
            raise Dead(f"what its producer puts out is also read elsewhere ({self._where(node)})")

    def forward(self, node: fx.Node, axis: int) -> Uses:
        """Walk from an activation's output to every linear map that reads it.

        Raises:
            Dead: something that is no linear map reads it, or something in between cannot be followed.
        """
        uses, channels = Uses(), (shape(node) or ())[axis]
        self._forward(node, axis, Way(channels), uses)
        if not uses.ports:
            raise Dead("nothing reads it")
        if any(port.stop - port.start != channels // uses.parts for port in uses.ports):
            raise Dead("after the activation, all channels are read, and a slice of them, too")
        return uses

    def _forward(self, node: fx.Node, axis: int, way: Way, uses: Uses) -> None:
        readers = users(node)
        if not readers and not way.apart:  # a part that nothing reads is none of anybody's business
            raise Dead("nothing reads it")
        for reader in readers:
            if reader.op == "output":
                returned = node in self.captured.returned(reader)
                raise Dead("it is an output of the model" if returned else "the forward keeps it on a module")
            if op_name(reader) in _LINEAR and reader.args[1 if op_name(reader) == "addmm" else 0] is node:
                port, _ = self.port(reader, node, axis, output=False)
                uses.ports.append(way.port(port))
                uses.nodes.append(reader)
                continue
            if op_name(reader) == "cat":
                self._joined(reader, node, axis, way, uses)
                continue
            motion = motion_of(reader, node, axis)
            if motion.axis is not None and motion.each and not way.folds:
                uses.bent, uses.direct = True, False
                self._forward(reader, motion.axis, way, uses)
                continue
            if motion.axis is None or motion.reason is not None:
                raise Dead(f"after the activation, {motion.reason} ({self._where(reader)})")
            further = way
            whole = (0, (shape(node) or shape_of_list(node) or ())[axis])
            if motion.rows is not None and motion.rows != whole:
                part = way.within(*motion.rows)
                if part is None or uses.parts not in (1, whole[1] // part.channels):
                    raise Dead(f"after the activation, a slice of the channels is taken ({self._where(reader)})")
                uses.parts, further = whole[1] // part.channels, part
            if motion.fold and not (motion.uniform and not self.folder.goes(reader)):
                index = uses.fold(reader, self.folder.fold(reader, node, motion.axis))
                further = way.behind(index, (shape(reader) or ())[motion.axis])
            elif not _stays(reader, motion) and not self._inside_linear(reader):
                uses.direct = False
                uses.steady = uses.steady and motion.steady
            self._forward(reader, motion.axis, further, uses)

    def _joined(self, reader: fx.Node, node: fx.Node, axis: int, way: Way, uses: Uses) -> None:
        """Through a concatenation along the channels: at each place where it takes them in."""
        parts: Any = reader.args[0]
        dim: Any = argument(reader, "dim", 0)
        if dim % len(shape(node) or (1,)) != axis:
            raise Dead(f"after the activation, it is joined by other positions ({self._where(reader)})")
        uses.direct = False
        sizes = [(shape(part) or (0,) * (axis + 1))[axis] for part in parts]
        for index, part in enumerate(parts):
            if part is node:
                self._forward(reader, axis, way.after(sum(sizes[:index])), uses)

    def port(self, node: fx.Node, operand: fx.Node, axis: int, *, output: bool) -> tuple[Port, fx.Node]:
        """The port of a linear op, and the last node of its module.

        Raises:
            Dead: its weight is not a parameter of a module of its own, is shared, or works on another axis.
        """
        name, path = op_name(node), self.captured.path(node)
        kind = _LINEAR[name]
        dims = 0 if kind == "linear" else int(kind[-2])
        sizes = shape(operand)
        if sizes is None or axis != len(sizes) - 1 - dims:
            raise Dead(f"{path or name} works on another axis than the channels")
        module = self.model.get_submodule(path)
        weight = argument(node, "mat2" if name == "addmm" else "weight")
        bias = node.args[0] if name == "addmm" else argument(node, "bias")
        own, odd = held(module, "weight"), quantised_part(module)
        if odd is not None and (own is None or oddity(own) is not None):
            raise Dead(f"in {path}, {odd}: {QUANTISE_LATER}")
        if not isinstance(weight, fx.Node) or CONSTANT not in weight.meta or shape(weight) != shape_of(own):
            raise Dead(f"the weight of {path or 'the model'} depends on the input, or belongs to another module")
        if bias is not None and (not isinstance(bias, fx.Node) or CONSTANT not in bias.meta):
            raise Dead(f"the bias of {path or 'the model'} depends on the input")
        extra = [op_name(other) for other in self._own(node) if op_name(other) not in (*_AROUND, "pad")]
        if extra or self._has_inner(path):
            what = f"also computes {extra[0]}" if extra else "holds other modules that compute"
            found = meddler(module)
            raise Dead(f"{path or 'the model'} {what}" if found is None else f"{path} has {found}")
        for parameter in (*self._behind(weight), *self._behind(bias)):
            if parameter in self.shared:
                raise Dead(f"{parameter} is shared with {self.shared[parameter]}")
        if self.captured.times.get(path, 1) > 1:
            raise Dead(f"{path} is called {self.captured.times[path]} times")
        transposed = name == "addmm"
        outputs, inputs = (shape(weight) or (1, 1))[:2][:: -1 if transposed else 1]
        if dims and not output:
            inputs *= _groups(node)
        total = int(outputs if output else inputs)
        positions = max(1, _numel(node) // max(1, int(outputs)))
        last = self.captured.siblings(node)[-1]
        return Port(path, kind, 0, total, total, transposed, positions), last if output else node

    def _behind(self, value: Any) -> list[str]:
        """The parameters and buffers that a constant is made of."""
        if not isinstance(value, fx.Node):
            return []
        if value in self.captured.parameters:
            return [self.captured.parameters[value]]
        return [name for source in value.all_input_nodes for name in self._behind(source)]

    def _inside_linear(self, node: fx.Node) -> bool:
        """True for the reshapes and the padding that a linear module wraps around its product."""
        if op_name(node) not in (*_AROUND, "pad") or self._has_inner(self.captured.path(node)):
            return False
        names = [op_name(other) for other in self.captured.siblings(node) if CONSTANT not in other.meta]
        linear = [name for name in names if name in _LINEAR]
        return len(linear) == 1 and all(name in _AROUND or name == "pad" or name in _LINEAR for name in names)

    def _through_linear(self, node: fx.Node, axis: int) -> tuple[fx.Node, int]:
        source, before, _ = self._step_back(node, axis)
        self._alone(source, packed=False)
        return source, before

    def _own(self, node: fx.Node) -> list[fx.Node]:
        """The other ops of the same module call that work on the input, not on parameters alone."""
        return [n for n in self.captured.siblings(node) if n is not node and CONSTANT not in n.meta]

    def _has_inner(self, path: str) -> bool:
        inside = (ops for call, ops in self.captured.ops.items() if call.path.startswith(f"{path}."))
        return not path or any(CONSTANT not in node.meta for ops in inside for node in ops)

    def _where(self, node: fx.Node) -> str:
        return self.captured.path(node) or "the model's own forward"


def _stays(node: fx.Node, motion: Motion) -> bool:
    """True for the identity, and for a slice of the channels that leaves every position where it is."""
    return op_name(node) in _STILL or op_name(node) in _PARTS or motion.rows is not None


def _is_adapter(module: nn.Module) -> bool:
    """True for a low-rank adapter around a linear map, which can be merged into it and taken out again."""
    return all(callable(getattr(module, name, None)) for name in ("merge", "unmerge"))


def shape_of(value: object) -> tuple[int, ...] | None:
    """Shape of a tensor that a module holds."""
    return tuple(value.shape) if isinstance(value, Tensor) else None


def shape_of_list(node: fx.Node) -> tuple[int, ...] | None:
    """Shape of the tensor that a chunk or split took apart."""
    value = node.meta.get("val")
    if isinstance(value, (list, tuple)) and isinstance(node.args[0], fx.Node):
        return shape(node.args[0])
    return None


def _groups(node: fx.Node) -> int:
    groups = argument(node, "groups")
    return groups if isinstance(groups, int) else 1


def _numel(node: fx.Node) -> int:
    total = 1
    for size in shape(node) or ():
        total *= size
    return total
