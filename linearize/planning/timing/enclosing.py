"""Latencies of places that contain other places, such as whole modules. The places inside count separately."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from linearize.export.runtimes import Runtime
from linearize.families.family import Layers
from linearize.families.option import Group, Option
from linearize.planning.timing.alone import runnable, seconds_of
from linearize.planning.timing.in_place import TimeShares
from linearize.running.models import evaluating

__all__ = ["with_enclosing_latencies"]

_log = logging.getLogger(__name__)


def with_enclosing_latencies(
    original: nn.Module,
    groups: Sequence[Group],
    layers: Callable[[Group, Option], Layers],
    shares: TimeShares,
    *,
    batch: int,
    rounds: int = 7,
    whole: Mapping[int, float] | None = None,
    runtime: Runtime | None = None,
) -> list[Group]:
    """The groups with measured latencies for those that enclose others, too, as shares of the whole model's.

    Args:
        original: the model as it came, with the same paths.
        groups: of which the innermost have latencies.
        layers: what would stand for an option of a group.
        shares: of the model's time, by path.
        batch: size of the example batch.
        rounds: measurements of each.
        whole: seconds of the whole model in the runtime, by batch size; only with one.
        runtime: in which places run by themselves; None for PyTorch.

    For a place that cannot be run by itself, FLOPs tell what an option would take of its time.
    """
    inner: dict[str, float] = {}  # time of what is inside, by path
    flops: dict[str, float] = {}  # likewise
    known: dict[str, Group] = {}
    for group in groups:
        if not group.encloses:
            inner[group.inside] = inner.get(group.inside, 0.0) + group.stay.cost("latency")
            flops[group.inside] = flops.get(group.inside, 0.0) + group.stay.flops
    outer = sorted((g for g in groups if g.encloses), key=lambda g: -len(g.sites[0].split(".")))  # innermost first
    for group in outer:
        path, (stay, *others) = group.sites[0], group.options
        own, held = dict(shares.get(path, {})), inner.get(path, 0.0)
        alone = [
            {size: _alone(original, group, layers(group, option), size, batch, rounds, runtime) for size in own}
            for option in others
        ]
        if whole is not None:  # shares are of the time in PyTorch
            own = {size: _share(share, [times[size] for times in alone], whole[size]) for size, share in own.items()}
        present = sum(own.values()) / max(1, len(own))
        total = stay.flops + flops.get(path, 0.0)
        found = []
        for option, times in zip(others, alone, strict=True):
            by_flops = option.flops / max(1.0, total)
            time = 0.0
            for size, share in own.items():
                measured = times[size]
                time += share * (by_flops if measured is None else measured[0]) / len(own)
            found.append(replace(option, latency=min(time, max(present, held))))
        rest = max(0.0, present - held)
        inner[group.inside] = inner.get(group.inside, 0.0) + held + rest
        flops[group.inside] = flops.get(group.inside, 0.0) + total
        known[path] = replace(group, options=(replace(stay, latency=rest), *found))
    return [known[group.sites[0]] if group.encloses else group for group in groups]


def _share(otherwise: float, times: Sequence[tuple[float, float] | None], whole: float) -> float:
    """Of the whole model's time in its runtime, from the seconds that stand behind some ratios."""
    seconds = [found[1] for found in times if found is not None]
    return min(1.0, sum(seconds) / len(seconds) / whole) if seconds else otherwise


def _alone(
    original: nn.Module,
    group: Group,
    layers: Layers,
    size: int,
    batch: int,
    rounds: int,
    runtime: Runtime | None,
) -> tuple[float, float] | None:
    """Time of the layer that would stand for a place, relative to what stands there now, and the seconds of this."""
    path = group.sites[0]
    if not group.shape or group.shape[0] % batch:
        return None
    module, layer = original.get_submodule(path), layers.modules[path]
    like = next(parameter for parameter in module.parameters() if parameter.is_floating_point())
    x = torch.randn((group.shape[0] // batch * size, *group.shape[1:]), dtype=like.dtype, device=like.device)
    kwargs = {layers.keyword: x} if layers.keyword else {}
    args = () if layers.keyword else (x,)
    with evaluating(module, layer):
        try:
            out, made = module(*args, **kwargs), layer(x)
        except Exception as error:  # it may want to be told more than it does by itself
            _log.debug("%s: cannot be run by itself (%s); FLOPs tell what it takes", path, error)
            return None
        if _shape(out) is None or _shape(out) != _shape(made):
            return None
        try:
            present, other = runnable(module, x, runtime, layers.keyword), runnable(layer, x, runtime)
        except Exception as error:  # whatever an exporter raises
            _log.debug("%s: cannot be brought to the runtime (%s); FLOPs tell what it takes", path, error)
            return None
        samples = seconds_of({"present": present, "other": other}, x, rounds, runtime)
    seconds = float(samples["present"].median())
    return (float((samples["other"] / samples["present"]).median()), seconds) if seconds > 0 else None


def _shape(output: Any) -> tuple[int, ...] | None:
    """The shape of the one tensor that a place gives, perhaps before a row of None."""
    first = output[0] if isinstance(output, tuple) and output else output
    return tuple(first.shape) if isinstance(first, Tensor) else None
