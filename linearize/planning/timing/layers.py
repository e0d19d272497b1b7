"""Measured latencies of options: the real layers in their real shapes, timed in turns, and stored on disk as ratios.

An entry of the table is the time of an option's layers, relative to the present layers, at one batch size. The ratio is
stored by device, threads, dtype, library versions and shapes. The share of the model's time that the present layers
take is measured again each time, inside the model (`in_place`). So a slow day does not spoil the table.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from linearize.export.runtimes import Runtime
from linearize.families.option import Group
from linearize.planning.timing.alone import LayerCall, interpolated, runnable, seconds_of, spread
from linearize.planning.timing.in_place import TimeShares
from linearize.planning.timing.shown import Shown
from linearize.planning.timing.table import LatencyTable
from linearize.report.timing import environment
from linearize.running.models import evaluating

__all__ = ["with_latencies"]

_log = logging.getLogger(__name__)

_EXPORTED = 6  # options of a group that are exported, which takes a second each; the others lie between them
_LEAST = 1e-3  # a ratio that a table keeps
_LARGEST_PART = 0.95  # of the whole model's time that the layers around activations can take


@dataclass(frozen=True)
class _Bench:
    """Where and how latencies are measured."""

    model: nn.Module
    shown: Shown
    batch: int
    sizes: Sequence[int]
    rounds: int
    flops: float
    runtime: Runtime | None

    @property
    def like(self) -> Tensor:
        return next(p for p in self.model.parameters() if p.is_floating_point())


def with_latencies(
    model: nn.Module,
    groups: Sequence[Group],
    shown: Shown,
    whole: dict[int, float],
    *,
    batch: int,
    flops: float,
    table: LatencyTable,
    shares: TimeShares | None = None,
    rounds: int = 7,
    runtime: Runtime | None = None,
) -> list[Group]:
    """The groups with measured latencies, as shares of the whole model's.

    Args:
        model: gated.
        groups: with their options.
        shown: the layers of each option of a group.
        whole: seconds of the whole original model, by batch size.
        batch: size of the batch in which the shapes were seen.
        flops: of the whole original model, for that batch.
        table: where ratios are looked up and noted.
        shares: of the model's time, by the name of a group's first site; one that is not known is measured by itself.
        rounds: measurements of each.
        runtime: in which layers run by themselves, and `whole` was measured; None for PyTorch.

    Options whose layers cannot be run by themselves are given the share of time that their FLOPs would take.
    """
    bench = _Bench(model, shown, batch, list(whole), rounds, flops, runtime)
    with evaluating(model):
        measured = [_measured(bench, group, whole, table, shares or {}) for group in groups]
    table.save()
    # Layers run by themselves take longer than in the model, where calls overlap: together no longer than the whole.
    parts = sum(group.stay.cost("latency") for group in measured)
    factor = min(1.0, _LARGEST_PART / parts) if parts else 1.0
    return [
        replace(g, options=tuple(replace(o, latency=o.cost("latency") * factor) for o in g.options)) for g in measured
    ]


def _measured(bench: _Bench, group: Group, whole: dict[int, float], table: LatencyTable, shares: TimeShares) -> Group:
    if len(group.options) == 1:  # its time is part of what no option changes
        return replace(group, options=(replace(group.stay, latency=0.0),))
    found = [0.0] * len(group.options)
    for size, seconds in whole.items():
        ratios, own = _ratios(bench, group, size, table)
        by_flops = group.stay.flops / max(bench.flops, 1.0)
        alone = by_flops if own is None else own / seconds
        stay = shares.get(group.sites[0], {}).get(size, alone)
        if bench.runtime is not None and own is not None:  # shares are of the time in PyTorch
            stay = alone
        for index, ratio in enumerate(ratios):
            found[index] += ratio * stay / len(whole)
    options = tuple(replace(o, latency=share) for o, share in zip(group.options, found, strict=True))
    return replace(group, options=options)


def _ratios(bench: _Bench, group: Group, size: int, table: LatencyTable) -> tuple[list[float], float | None]:
    """Time of every option relative to the first, and the seconds of the first; by FLOPs and None if it cannot run."""
    shape = group.shape
    by_flops = [option.flops / max(group.stay.flops, 1.0) for option in group.options]
    if not shape or shape[0] % bench.batch:
        return by_flops, None
    like = bench.like
    shape = (shape[0] // bench.batch * size, *shape[1:])
    x = torch.randn(shape, dtype=like.dtype, device=like.device)
    try:
        present = bench.shown.together(group, None)
        if present is None:
            return by_flops, None
        present.module(x)
        runs: dict[str, LayerCall] = {"stay": runnable(present.module, x, bench.runtime)}
        keys: dict[int, str] = {}
        for index in _chosen(bench, by_flops):
            layers = bench.shown.layers(group, group.options[index])
            key = keys[index] = _key(bench, present.key, shape, layers.key)
            if key not in table.entries and key not in runs:
                option = bench.shown.together(group, layers)
                if option is None:
                    return by_flops, None
                option.module(x)
                runs[key] = runnable(option.module, x, bench.runtime)
    except Exception as error:  # whatever stands between the maps may need the shapes that it knows
        _log.debug("%s: cannot be run by itself (%s); FLOPs tell what it takes", group.sites[0], error)
        return by_flops, None
    samples = seconds_of(runs, x, bench.rounds, bench.runtime)
    own = float(samples["stay"].median())
    if own <= 0:  # nothing beside the call itself
        return by_flops, None
    for key, values in samples.items():
        if key != "stay":
            table.entries[key] = max(_LEAST, float((values / samples["stay"]).median()))
    return interpolated(by_flops, {0: 1.0, **{index: table.entries[key] for index, key in keys.items()}}), own


def _chosen(bench: _Bench, by_flops: Sequence[float]) -> list[int]:
    """The options that are timed: all; in another runtime only some, since each is exported for it."""
    if bench.runtime is None:
        return list(range(1, len(by_flops)))
    return [1 + index for index in spread(by_flops[1:], _EXPORTED)]


def _key(bench: _Bench, present: Sequence[Any], shape: tuple[int, ...], text: str) -> str:
    like = bench.like
    facts = environment(like.device, like.dtype)
    where = {name: facts[name] for name in ("device", "threads", "dtype", "torch")}
    where |= {} if bench.runtime is None else {"runtime": bench.runtime.told}
    told = json.dumps([where, shape, *present, text], sort_keys=True, default=str)
    return hashlib.sha256(told.encode()).hexdigest()[:24]
