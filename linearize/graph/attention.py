"""Attention in a captured graph: its heads, and the rows and columns of the linear maps around it that belong to each.

It is found by what it does, a softmax of products that weighs values, and never by the name of a class. How features
lie in heads is not guessed from views either: numbers are sent through the ops in between (`segment`).

Shape letters: B samples, H query heads, T positions, D features of a head.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import fx, nn

from linearize.graph.capture import Capture, Inputs, capture, shape, users
from linearize.graph.ops import op_name
from linearize.graph.overlap import shared_parameters
from linearize.graph.problem import Dead
from linearize.graph.segment import Segment, labels_through, origins
from linearize.graph.walk import Walker
from linearize.graph.weighing import LINEAR, QUIET, SCORED, AttentionNodes, cores, scores
from linearize.sites.site import Port

__all__ = ["Attention", "Rows", "attentions_of"]

_PARTS = ("slice", "select", "getitem", "transpose", "permute", "cat")


@dataclass(frozen=True)
class Rows:
    """A linear map before the attention, and its output features that each query head reads."""

    port: Port
    by_head: tuple[tuple[int, ...], ...]

    @property
    def shared(self) -> bool:
        """True if all heads read the same: one group of keys and values."""
        return len(set(self.by_head)) == 1 and len(self.by_head) > 1

    @property
    def groups(self) -> int:
        """How many different sets of features there are."""
        return len(set(self.by_head))


@dataclass(frozen=True)
class Attention:
    """An attention whose heads can be told apart, or the reason why not.

    Attributes:
        owner: path of the module whose forward computes it.
        rows: of each linear map before it: queries, keys and values, packed or not.
        out: the linear map behind it.
        columns: its input features, by head, in the order of D.
        units: heads that can only go together, since they share keys or values.
        scores: additions and multiplications of one head, for the captured batch.
        kept, shared: numbers that a cache of keys and values holds for the captured batch: those that belong to heads,
            and those that all heads share.
        reason: why its heads cannot be told apart; then all else is empty.
    """

    owner: str
    rows: tuple[Rows, ...] = ()
    out: Port | None = None
    columns: tuple[tuple[int, ...], ...] = ()
    units: tuple[tuple[int, ...], ...] = ()
    scores: float = 0.0
    kept: float = 0.0
    shared: float = 0.0
    reason: str | None = None


def attentions_of(model: nn.Module, inputs: Inputs) -> tuple[list[Attention], Capture]:
    """All attentions of a model in order of execution, and the graph in which they were found.

    Raises:
        CaptureError: the model cannot be captured on these inputs.
    """
    captured = capture(model, inputs)
    walker = Walker(model, captured, shared_parameters(model, captured))
    found = []
    for core in cores(captured.graph):
        owner = captured.path(core.out)
        try:
            found.append(_read(walker, core, owner))
        except Dead as why:
            found.append(Attention(owner, reason=str(why)))
        except (RuntimeError, TypeError, ValueError, IndexError) as error:  # ops that do not run on made-up numbers
            line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            found.append(Attention(owner, reason=f"what lies between its maps cannot be run by itself ({line})"))
    return found, captured


def _read(walker: Walker, core: AttentionNodes, owner: str) -> Attention:
    captured = walker.captured
    sizes = shape(core.out) or ()
    if len(sizes) not in (3, 4) or (len(sizes) == 4 and sizes[0] != 1 and sizes[-3] == 1):
        raise Dead("its heads are on no axis of their own")
    heads, width = sizes[-3], sizes[-1]
    if heads < 2:
        raise Dead("it has one head")
    read: dict[fx.Node, list[set[int]]] = {}
    for target in core.scored:
        _note(read, _dependence(captured, target), heads)
    if all(len({frozenset(some) for some in by}) == 1 for by in read.values()):
        raise Dead("its heads are mixed before they are scored, as by a norm over all of them")
    values = _values(captured, core, heads, width)
    _note(read, values, heads)
    rows = {node: Rows(_before(walker, node), tuple(tuple(sorted(some)) for some in by)) for node, by in read.items()}
    _private(captured, list(read), core)
    out_node, columns = _columns(captured, core.out, heads, width)
    operand = out_node.args[1 if op_name(out_node) == "addmm" else 0]
    port, _ = walker.port(out_node, operand, len(shape(operand) or ()) - 1, output=False)  # type: ignore[arg-type]
    if port.dims:
        raise Dead(f"{port.module} is no matrix")
    units = _units(list(rows.values()), heads)
    kept, shared = _kept(captured, core, values)
    return Attention(owner, tuple(rows.values()), port, columns, units, scores(core, sizes), kept, shared)


def _note(read: dict[fx.Node, list[set[int]]], found: list[dict[fx.Node, frozenset[int]]], heads: int) -> None:
    """Add what the heads read; keys and values with fewer heads serve as many query heads each."""
    share = heads // len(found)
    if share * len(found) != heads:
        raise Dead(f"{heads} heads of queries meet {len(found)} of keys or values")
    for head in range(heads):
        for node, features in found[head // share].items():
            read.setdefault(node, [set() for _ in range(heads)])[head] |= features


def _dependence(captured: Capture, target: fx.Node) -> list[dict[fx.Node, frozenset[int]]]:
    """By head of what is scored, the features of linear maps that it depends on."""
    sources = origins(target, LINEAR, op_name)
    if not sources:
        raise Dead("its queries or keys come from no linear map")
    if len(shape(target) or ()) < 3:
        raise Dead("its heads are on no axis of their own")
    for truth in (False, True):  # a mask may say what to look at, or what not
        found = Segment(captured, sources, target, truth).dependence(-3)
        if all(any(by.values()) for by in found):
            return found
    raise Dead("a head of it depends on nothing")


def _values(captured: Capture, core: AttentionNodes, heads: int, width: int) -> list[dict[fx.Node, frozenset[int]]]:
    """By head of the values, their features in the linear map that they come from; they are only moved on the way."""
    sources = origins(core.values, LINEAR, op_name)
    if len(sources) != 1:
        raise Dead("its values come from several linear maps" if sources else "its values come from no linear map")
    sizes = shape(sources[0]) or ()
    labels = torch.arange(sizes[-1]).expand(sizes)
    found = labels_through(captured, sources[0], core.values, labels)
    if found is None or found.dim() < 3:
        raise Dead("something is done to its values before they are weighed")
    found = found.movedim((-3, -1), (0, 1)).flatten(2)
    if bool((found != found[..., :1]).any()) or found.shape[1] != width or heads % len(found):
        raise Dead("its values do not lie in heads")
    return [{sources[0]: frozenset(row.tolist())} for row in found[..., 0]]


def _columns(captured: Capture, out: fx.Node, heads: int, width: int) -> tuple[fx.Node, tuple[tuple[int, ...], ...]]:
    """The linear op that reads the attention, and the input features of each head there."""
    node = out
    while not (node.op == "call_function" and op_name(node) in LINEAR):
        readers = users(node)
        if len(readers) != 1 or readers[0].op != "call_function":
            raise Dead("what it gives is read in more than one place" if len(readers) > 1 else "nothing reads it")
        if op_name(readers[0]) in LINEAR:
            operand = readers[0].args[1 if op_name(readers[0]) == "addmm" else 0]
            if operand is not node:
                raise Dead("what it gives is a weight")
            break
        node = readers[0]
    sizes = shape(out) or ()
    labels = (torch.arange(heads)[:, None] * width + torch.arange(width)).view(heads, 1, width)
    found = labels_through(captured, out, node, labels.expand(sizes[-3:]).expand(sizes))
    if found is None:
        raise Dead(f"something is done to what it gives before it is projected ({op_name(node)})")
    flat = found.flatten(0, -2)
    if bool((flat != flat[:1]).any()) or sorted(flat[0].tolist()) != list(range(heads * width)):
        raise Dead("its heads are not laid side by side before they are projected")
    place = {label: column for column, label in enumerate(flat[0].tolist())}
    by_head = tuple(tuple(place[head * width + d] for d in range(width)) for head in range(heads))
    return users(node)[0], by_head


def _before(walker: Walker, node: fx.Node) -> Port:
    port, _ = walker.port(node, node, len(shape(node) or ()) - 1, output=True)
    return port


def _private(captured: Capture, sources: list[fx.Node], core: AttentionNodes) -> None:
    """See that nothing else reads queries, keys and values, but caches in the output of the model."""
    inside: set[fx.Node] = set(sources)
    for target in (*core.scored, core.values):
        own = [source for source in sources if captured.order[source] < captured.order[target]]
        inside.update(Segment(captured, own, target).between)
    inside.update((core.out, *core.scored))
    for node in inside - {core.out, *core.scored} | {core.values}:
        for user in users(node):
            known = user in inside or op_name(user) in SCORED or _leaves(user)
            if not known and op_name(user) not in QUIET:
                raise Dead(f"{op_name(user)} in {captured.path(user) or 'the model'} also reads them")


def _leaves(node: fx.Node) -> bool:
    """True for what leads to outputs of the model as it is, such as a cache, or to nothing."""
    if node.op == "output":
        return True
    return op_name(node) in (*QUIET, *_PARTS) and all(_leaves(user) for user in users(node))


def _units(rows: list[Rows], heads: int) -> tuple[tuple[int, ...], ...]:
    """Heads that read a feature in common go together; a map that all read as a whole stays as it is."""
    unit = list(range(heads))
    for some in rows:
        if some.shared:
            continue
        owner: dict[int, int] = {}
        for head, features in enumerate(some.by_head):
            for feature in features:
                first, own = unit[owner.setdefault(feature, head)], unit[head]
                unit = [first if u == own else u for u in unit]
    groups = tuple(tuple(h for h in range(heads) if unit[h] == u) for u in dict.fromkeys(unit))
    if len(groups) < 2:
        raise Dead("all of its heads depend on each other, or share everything")
    if len({len(group) for group in groups}) > 1:
        raise Dead("its groups are of different sizes")
    return groups


def _kept(captured: Capture, core: AttentionNodes, values: list[dict[fx.Node, frozenset[int]]]) -> tuple[float, float]:
    """Numbers that a cache holds: of keys and values that belong to heads, and of those that all heads share."""
    found = [values]
    if core.keys is not None:
        found.append(_dependence(captured, core.keys))
    own = shared = 0.0
    for some in found:
        sets = {(node, feature) for by in some for node, features in by.items() for feature in features}
        positions = max((_rows(node) for node, _ in sets), default=0)
        if len(some) == 1 or len({tuple(by.items()) for by in some}) == 1:
            shared += positions * len(sets)
        else:
            own += positions * len(sets)
    return own, shared


def _rows(node: fx.Node) -> int:
    sizes = shape(node) or (1,)
    return math.prod(sizes[:-1])
