"""Where a captured graph weighs values by a softmax of products: the nodes of each attention.

Shape letters: H query heads, T positions, D features of a head.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import fx

from linearize.graph.capture import shape, users
from linearize.graph.ops import op_name
from linearize.graph.segment import origins

__all__ = ["LINEAR", "QUIET", "SCORED", "AttentionNodes", "cores", "scores"]

LINEAR = ("linear", "addmm")
_FUSED = "scaled_dot_product_attention"
SCORED = ("softmax", "_softmax", _FUSED)
_PRODUCTS = ("matmul", "bmm")
_FAR = 12  # ops between the product and the softmax: scales, masks, casts
QUIET = ("dropout", "to", "_to_copy", "type_as", "contiguous", "clone", "alias", "detach", "view", "reshape", "expand")


@dataclass(frozen=True)
class AttentionNodes:
    """The nodes of one attention: what is weighed, and by what."""

    scored: tuple[fx.Node, ...]  # each with the heads on the third axis from the end
    values: fx.Node
    out: fx.Node
    keys: fx.Node | None
    fused: bool = True


def cores(graph: fx.Graph) -> Iterator[AttentionNodes]:
    """The attentions of a graph, in order of execution."""
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        if op_name(node) == _FUSED:
            q, k, v = node.args[:3]
            yield AttentionNodes((q, k), v, node, k)
        elif op_name(node) in SCORED[:2] and len(shape(node) or ()) >= 3:
            product = _weighing(node)
            if product is not None:
                yield AttentionNodes((node.args[0],), product.args[1], product, _keys(node), fused=False)  # type: ignore[arg-type]


def _weighing(softmax: fx.Node) -> fx.Node | None:
    """The product in which the result of a softmax weighs values that depend on the input."""
    node = softmax
    while True:
        readers = [user for user in users(node) if user.op == "call_function"]
        products = [r for r in readers if op_name(r) in _PRODUCTS and r.args[0] is node]
        if products:
            values = products[0].args[1]
            return products[0] if isinstance(values, fx.Node) and origins(values, LINEAR, op_name) else None
        quiet = [reader for reader in readers if op_name(reader) in QUIET]
        if len(quiet) != 1:
            return None
        node = quiet[0]


def _keys(softmax: fx.Node) -> fx.Node | None:
    """The keys in the product that a softmax is taken of, with their features on the axis before the last."""
    node: Any = softmax.args[0]
    for _ in range(_FAR):
        if not isinstance(node, fx.Node) or node.op != "call_function":
            return None
        if op_name(node) in _PRODUCTS:
            keys = node.args[1]
            return keys if isinstance(keys, fx.Node) and len(shape(keys) or ()) >= 3 else None
        larger = [s for s in node.all_input_nodes if shape(s) == shape(node) and origins(s, LINEAR, op_name)]
        if len(larger) != 1:
            return None
        node = larger[0]
    return None


def scores(core: AttentionNodes, sizes: tuple[int, ...]) -> float:
    """The costs of one head: products of queries and keys, and the weighing of values."""
    batch, positions, width = (sizes[0] if len(sizes) == 4 else 1), sizes[-2], sizes[-1]
    read = (shape(core.values) or ())[-2]
    keys = shape(core.keys) if core.keys is not None else None
    inner = width if keys is None else keys[-1 if core.fused else -2]
    return 2.0 * batch * positions * read * (inner + width)
