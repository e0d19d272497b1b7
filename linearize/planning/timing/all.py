"""Latencies of all groups: shares of time measured inside the model, times measured ratios of layers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from linearize.bench import benchmark
from linearize.export.runtimes import Runtime
from linearize.families.option import Group
from linearize.gating.gate import gates
from linearize.gating.groups import ports_of
from linearize.planning.timing.enclosing import with_enclosing_latencies
from linearize.planning.timing.in_place import TimeShares, shares_in_place
from linearize.planning.timing.layers import with_latencies
from linearize.planning.timing.shown import Shown
from linearize.planning.timing.table import LatencyTable

__all__ = ["batch_size", "parts_of", "priced", "timed"]


def timed(
    original: nn.Module,
    gated: nn.Module,
    groups: Sequence[Group],
    shown: Shown,
    batch: Any,
    batch_sizes: Sequence[int] | None,
    *,
    flops: float,
    rounds: int,
    cache: Path | None,
    runtime: Runtime | None = None,
) -> list[Group]:
    """The groups with latencies, as shares of the original's.

    Args:
        original: the model as it came.
        gated: the same, converted.
        groups: of sites, and of places that enclose them.
        shown: the layers of each option of a group.
        batch: one.
        batch_sizes: None takes that of the batch.
        flops: of the original, for the batch.
        rounds: measurements of each.
        cache: file of ratios; None remembers none.
        runtime: where latencies are measured; None for PyTorch. What cannot be run there by itself, such as heads of
            attention, is given its share of the time in PyTorch.
    """
    size = batch_size(batch)
    sizes = batch_sizes or [size]
    shares = shares_in_place(original, batch, sizes, parts_of(gated, groups), rounds=rounds)
    whole = _whole(original, batch, sizes, rounds, runtime)
    how: dict[str, Any] = {"size": size, "flops": flops, "rounds": rounds, "cache": cache, "runtime": runtime}
    return priced(original, gated, groups, shown, shares, whole, **how)


def parts_of(gated: nn.Module, groups: Sequence[Group]) -> dict[str, list[str]]:
    """By the first site of each group, the modules that belong to it."""
    return {group.sites[0]: _modules_of(gated, group) for group in groups}


def priced(
    original: nn.Module,
    gated: nn.Module,
    groups: Sequence[Group],
    shown: Shown,
    shares: TimeShares,
    whole: dict[int, float],
    *,
    size: int,
    flops: float,
    rounds: int,
    cache: Path | None,
    runtime: Runtime | None = None,
) -> list[Group]:
    """The groups with latencies, from the shares of time that their present layers take.

    Args:
        original: the model as it came.
        gated: the same, converted.
        groups: of sites, and of places that enclose them, with the shapes of their inputs.
        shown: the layers of each option of a group.
        shares: measured inside the model.
        whole: seconds of the whole model, by batch size.
        size: of the batch in which the shapes are.
        flops: of the original, for that batch.
        rounds: measurements of each.
        cache: file of ratios; None remembers none.
        runtime: where layers are timed; None for PyTorch.
    """
    inner = [group for group in groups if not group.encloses]
    table = LatencyTable.open(cache)
    inner = with_latencies(
        gated,
        inner,
        shown,
        whole,
        batch=size,
        flops=flops,
        table=table,
        shares=shares,
        rounds=rounds,
        runtime=runtime,
    )
    outer = [group for group in groups if group.encloses]
    return with_enclosing_latencies(
        original, [*inner, *outer], shown.layers, shares, batch=size, rounds=rounds,
        whole=None if runtime is None else whole, runtime=runtime,
    )  # fmt: skip


def _modules_of(gated: nn.Module, group: Group) -> list[str]:
    """The modules of a group: its maps, and the norms between them; or the module that it is."""
    if group.encloses:
        return list(group.sites)
    if group.touches:
        return list(group.touches)
    named = gates(gated)
    sites = [site for name in group.sites if name in named and (site := named[name].site) is not None]
    ports = [port.module for site in sites for port in ports_of(site)]
    folds = [f.module for site in sites for f in (*site.folds, *site.up_folds, *site.consumer_folds)]
    return list(dict.fromkeys((*ports, *folds)))


def batch_size(batch: Any) -> int:
    """Length of the first tensor of a batch."""
    from torch.utils import _pytree as pytree

    return next((leaf.shape[0] for leaf in pytree.tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.dim()), 1)


def _whole(
    original: nn.Module, batch: Any, sizes: Sequence[int], rounds: int, runtime: Runtime | None
) -> dict[int, float]:
    """Seconds of the whole model, by batch size."""
    found = benchmark({"original": original}, batch, rounds=rounds, batch_sizes=list(sizes), runtime=runtime)
    return {timing.batch_size: timing.median for timing in found.timings}
