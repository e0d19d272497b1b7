"""A part of a captured graph, run by itself on numbers that tell what depends on what."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from linearize.graph.capture import Capture, shape

__all__ = ["Segment", "labels_through", "origins"]


@dataclass(frozen=True)
class Segment:
    """The ops from some nodes to another one; whatever else they read is made up, in its shape and dtype.

    Attributes:
        captured: the model.
        sources: nodes that are given values.
        target: the node whose value is wanted.
        truth: what made-up masks hold.
    """

    captured: Capture
    sources: Sequence[fx.Node]
    target: fx.Node
    truth: bool = False

    @property
    def between(self) -> list[fx.Node]:
        """The nodes that depend on a source and that the target depends on, in order; the target is the last."""
        first = min(self.captured.order[source] for source in self.sources)
        needed, waiting = {self.target}, [self.target]
        while waiting:
            for node in waiting.pop().all_input_nodes:
                if node not in needed and self.captured.order[node] > first:
                    needed.add(node)
                    waiting.append(node)
        found: list[fx.Node] = []
        moved = set(self.sources)
        for node in sorted(needed, key=self.captured.order.__getitem__):
            if node not in moved and any(source in moved for source in node.all_input_nodes):
                moved.add(node)
                found.append(node)
        return found

    def run(self, values: Sequence[Tensor]) -> Any:
        """The target's value, given those of the sources."""
        known: dict[fx.Node, Any] = dict(zip(self.sources, values, strict=True))
        generator = torch.Generator().manual_seed(0)

        def value(node: fx.Node) -> Any:
            if node not in known:
                known[node] = _made_up(node.meta.get("val"), generator, truth=self.truth)
            return known[node]

        for node in self.between:
            args = fx.map_arg(node.args, value)
            kwargs = fx.map_arg(node.kwargs, value)
            known[node] = node.target(*args, **kwargs)  # type: ignore[operator]
        return known[self.target]

    def dependence(self, axis: int) -> list[dict[fx.Node, frozenset[int]]]:
        """By place on an axis of the target, the features of each source that it depends on.

        Gradients on random numbers tell: where one is zero at all positions, nothing depends.
        """
        generator = torch.Generator().manual_seed(1)
        values = [
            torch.randn(shape(source) or (), generator=generator).to(source.meta["val"]).requires_grad_()
            for source in self.sources
        ]
        with torch.enable_grad():
            out = self.run(values)
            mixed = out * torch.randn(out.shape, generator=generator).to(out)
            found = []
            for place in range(out.shape[axis]):
                scalar = mixed.select(axis, place)
                scalar = scalar[scalar.isfinite()].sum()
                grads = torch.autograd.grad(scalar, values, retain_graph=True, allow_unused=True)
                found.append({s: _features(g) for s, g in zip(self.sources, grads, strict=True)})
        return found


def _features(gradient: Tensor | None) -> frozenset[int]:
    """Indices on the last axis with a gradient anywhere."""
    if gradient is None:
        return frozenset()
    seen = (gradient != 0).flatten(0, -2).any(0)
    return frozenset(seen.nonzero().flatten().tolist())


def labels_through(captured: Capture, source: fx.Node, target: fx.Node, labels: Tensor) -> Tensor | None:
    """Where labels on a source are in a target that only moves its values; None if anything else is done to them.

    Args:
        captured: the model.
        source: a node.
        target: a node behind it.
        labels: whole numbers of the source's shape.
    """
    if source is target:
        return labels
    signs = 1 - 2 * (labels % 2)  # of both signs, so that a ReLU shows
    value = ((labels + 1) * signs).to(source.meta["val"].device, torch.float32)
    found = Segment(captured, [source], target).run([value])
    if not isinstance(found, Tensor) or not found.is_floating_point():
        return None
    moved = found.float().cpu()
    again = moved.abs().round().long() - 1
    same = bool(((again + 1) * (1 - 2 * (again % 2)) == moved).all()) and bool(torch.isin(again, labels.unique()).all())
    return again if same else None


def origins(node: fx.Node, stops: Iterable[str], name_of: Any) -> list[fx.Node]:
    """The nearest ops of some names that a node's value comes from, in the order in which they are met."""
    names = frozenset(stops)
    found: dict[fx.Node, None] = {}
    seen, waiting = {node}, [node]
    while waiting:
        current = waiting.pop()
        if current.op == "call_function" and name_of(current) in names:
            found[current] = None
            continue
        for source in current.all_input_nodes:
            if source not in seen:
                seen.add(source)
                waiting.append(source)
    return list(found)


def _made_up(value: Any, generator: torch.Generator, *, truth: bool) -> Any:
    """A stand-in for a value that no source has a part in."""
    if isinstance(value, (list, tuple)):
        return [_made_up(part, generator, truth=truth) for part in value]
    if not isinstance(value, Tensor):
        return value
    sizes = tuple(int(size) for size in value.shape)
    if value.is_floating_point():
        return torch.randn(sizes, generator=generator).to(value)
    return torch.full(sizes, truth if value.dtype == torch.bool else 0, dtype=value.dtype, device=value.device)
