"""How path lengths pass through a network: a distribution for each element of a tensor, and how they are merged.

A `Flow` belongs to a tensor of shape S. Its grid G is S, with size 1 on each axis along which all entries are equal. So
a dense layer is cheap, and positions and batches take no memory. Shape letters: G the grid, K lengths 0 .. K - 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

TensorSizes = tuple[int, ...]


@dataclass(frozen=True)
class Flow:
    """The paths from the input that end in each element of a tensor.

    Attributes:
        lengths: float64 (*G, K), how the lengths of an element's paths are distributed; all 0 if no path ends there.
        log: float64 (*G). Unnormalized: the logarithm of the number of paths. Normalized: the logarithm of the
            element's share when a walk that goes backwards chooses among the elements. -inf: no path.
        soft: the tensor is made of attention weights (a softmax), which mix tokens.
    """

    lengths: Tensor
    log: Tensor
    soft: bool = False

    @property
    def grid(self) -> TensorSizes:
        """The shape of the grid, G."""
        return tuple(self.log.shape)

    @property
    def uniform(self) -> bool:
        """True if all elements of the tensor are equal."""
        return self.log.numel() == 1


def source(rank: int) -> Flow:
    """One path of length 0 to every element of a tensor of that rank."""
    ones = (1,) * rank
    return Flow(torch.ones(*ones, 1, dtype=torch.float64), torch.zeros(ones, dtype=torch.float64))


def ranked(flow: Flow, rank: int) -> Flow:
    """The same flow for a tensor of another rank. It is broadcast from the left, or as a whole if it is uniform."""
    if flow.uniform:
        return replace(flow, lengths=flow.lengths.reshape(*(1,) * rank, -1), log=flow.log.reshape((1,) * rank))
    missing = rank - len(flow.grid)
    if missing <= 0:
        return flow
    ones = (1,) * missing
    return replace(
        flow, lengths=flow.lengths.reshape(*ones, *flow.lengths.shape), log=flow.log.reshape(*ones, *flow.grid)
    )


def padded(flows: Sequence[Flow]) -> list[Tensor]:
    """The lengths of several flows, with zeros up to the longest of all."""
    longest = max(flow.lengths.shape[-1] for flow in flows)
    return [functional.pad(flow.lengths, (0, longest - flow.lengths.shape[-1])) for flow in flows]


def _weighted(lengths: Tensor, log: Tensor, axis: int) -> Tensor:
    """The mean of lengths over an axis, weighted by shares whose logarithms are given; 0 where there is no path."""
    shares = (log - log.amax(axis, keepdim=True)).exp().nan_to_num(nan=0.0)
    return (shares.unsqueeze(-1) * lengths).sum(axis) / shares.sum(axis).clamp_min(1).unsqueeze(-1)


def reduced(flow: Flow, axis: int) -> Flow:
    """Merge all elements along an axis of the grid, each with its share. The axis stays, with size 1."""
    total = torch.logsumexp(flow.log, axis, keepdim=True)
    return replace(flow, lengths=_weighted(flow.lengths, flow.log, axis).unsqueeze(axis), log=total)


def contract(flow: Flow, axis: int, size: int, groups: int = 1) -> Flow:
    """A dense layer: every output is reached from all `size` elements along `axis`, or from those of its group.

    The result has `groups` entries on the axis, or one if they are alike.
    """
    axis %= len(flow.grid)
    if flow.grid[axis] == 1:
        return replace(flow, log=flow.log + math.log(size / groups))
    if groups == 1:
        return reduced(flow, axis)
    split = (*flow.grid[:axis], groups, size // groups, *flow.grid[axis + 1 :])
    grouped = replace(flow, lengths=flow.lengths.reshape(*split, -1), log=flow.log.reshape(split))
    result = reduced(grouped, axis + 1)
    return replace(result, lengths=result.lengths.squeeze(axis + 1), log=result.log.squeeze(axis + 1))


def average(flow: Flow, axes: Sequence[int]) -> Flow:
    """Merge all positions along some axes into one element, because positions are not paths of their own."""
    for axis in axes:
        size = flow.grid[axis]
        if size > 1:
            flow = reduced(flow, axis)
            flow = replace(flow, log=flow.log - math.log(size))
    return flow


def repeated(flow: Flow, axis: int, times: int) -> Flow:
    """Every entry along an axis `times` times in a row."""
    if flow.grid[axis] == 1 or times == 1:
        return flow
    return replace(
        flow, lengths=flow.lengths.repeat_interleave(times, axis), log=flow.log.repeat_interleave(times, axis)
    )


def meet(flows: Sequence[Flow], *, normalized: bool) -> Flow:
    """Branches that meet, element by element: a sum, a product, a maximum.

    Unnormalized, all paths count alike. Normalized, each branch that has a path counts alike.
    """
    if len(flows) == 1:
        return flows[0]
    rank = max(len(flow.grid) for flow in flows)
    flows = [ranked(flow, rank) for flow in flows]
    lengths = torch.stack(torch.broadcast_tensors(*padded(flows)))
    logs = torch.stack(torch.broadcast_tensors(*((_level(f.log) if normalized else f.log) for f in flows)))
    weights = logs
    if normalized:
        weights = torch.zeros_like(logs).masked_fill(logs == -math.inf, -math.inf)
        logs = logs - torch.logsumexp(weights, 0)
    log = torch.logsumexp(logs, 0)
    return Flow(_weighted(lengths, weights, 0), log, any(flow.soft for flow in flows))


def _level(log: Tensor) -> Tensor:
    """Shares with a mean of 1 over the elements that a path leads to."""
    return log - torch.logsumexp(log.flatten(), 0) + math.log(max(1, int((log > -math.inf).sum())))


def concatenate(parts: Sequence[tuple[Flow | None, TensorSizes]], axis: int, *, normalized: bool) -> Flow | None:
    """Branches side by side along an axis; a part of None is a constant, which no path leads to.

    Normalized, a walk that comes to the whole takes each branch with the same probability, however wide it is.
    """
    flows = [flow for flow, _ in parts if flow is not None]
    if not flows:
        return None
    longest = max(flow.lengths.shape[-1] for flow in flows)
    others = [1 if i == axis else max(flow.grid[i] for flow in flows) for i in range(len(flows[0].grid))]
    lengths, logs = [], []
    for flow, sizes in parts:
        grid = (*others[:axis], sizes[axis], *others[axis + 1 :])
        if flow is None:
            lengths.append(torch.zeros(*grid, longest, dtype=torch.float64))
            logs.append(torch.full(grid, -math.inf, dtype=torch.float64))
            continue
        held = functional.pad(flow.lengths, (0, longest - flow.lengths.shape[-1]))
        lengths.append(held.expand(*grid, longest))
        log = flow.log.expand(grid)
        logs.append(log - torch.logsumexp(log.flatten(), 0) if normalized else log)
    return Flow(torch.cat(lengths, axis), torch.cat(logs, axis))


def passed(flow: Flow, nonlinear: Tensor, axis: int | None, *, cut: bool) -> Flow:
    """The flow after an activation: paths through its nonlinear channels (bool, (C,)) are longer by one.

    Args:
        flow: of what the activation reads.
        nonlinear: which channels are nonlinear.
        axis: the channel axis, counted from the end; None if all channels are alike.
        cut: a linear channel is a constant, which no path leads through.
    """
    longer = functional.pad(flow.lengths, (1, 0))
    if axis is None or bool(nonlinear.all()):
        return replace(flow, lengths=longer, soft=False)
    sizes = [1] * len(flow.grid)
    sizes[axis] = nonlinear.numel()
    mask = nonlinear.view(sizes)
    lengths = torch.where(mask.unsqueeze(-1), longer, functional.pad(flow.lengths, (0, 1)))
    log = flow.log.expand(lengths.shape[:-1])
    if cut:
        log = log.masked_fill(~mask, -math.inf)
        lengths = lengths.masked_fill(~mask.unsqueeze(-1), 0)
    return Flow(lengths, log)


def gathered(flow: Flow, index: Tensor) -> Flow:
    """The elements of the grid that `index` (integers, of the shape of the result) names; -1 is one without paths.

    Axes along which all entries are alike shrink to size 1.
    """
    for axis, size in enumerate(index.shape):
        first = index.narrow(axis, 0, 1)
        if size > 1 and bool((index == first).all()):
            index = first
    flat = index.reshape(-1)
    longest = flow.lengths.shape[-1]
    lengths = flow.lengths.reshape(-1, longest)[flat.clamp_min(0)].masked_fill((flat < 0).unsqueeze(-1), 0)
    log = flow.log.reshape(-1)[flat.clamp_min(0)].masked_fill(flat < 0, -math.inf)
    return replace(flow, lengths=lengths.reshape(*index.shape, longest), log=log.reshape(index.shape))
