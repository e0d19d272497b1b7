"""Options of whole modules, and how they go together with those of the sites inside."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from linearize.bench import interleaved
from linearize.families.modules.whole import Whole, layer_of
from linearize.families.option import WHOLE, Group, Option, SiteChoice
from linearize.planning.timing.in_place import Shares
from linearize.running.models import evaluating
from linearize.surgery.specs import build
from linearize.training.distance import losses_with

__all__ = ["with_module_latencies", "with_modules"]

_HOPELESS = 1.0  # a loss as bad as an output of zeros, or a nat of divergence


def with_modules(
    groups: Sequence[Group],
    wholes: Sequence[Whole],
    model: nn.Module,
    batches: Sequence[Any],
    *,
    progress: bool = False,
) -> list[Group]:
    """The groups of sites, told in which module they are, and a group for each module that may become one linear map.

    What it costs to leave a module as it is, is only what its groups and the modules inside do not count themselves.

    Args:
        groups: of sites.
        wholes: observed, outermost first.
        model: gated.
        batches: on which a module's loss is measured: how errors at many positions add up cannot be predicted.
        progress: show a bar.
    """
    fits = {whole.path: fit for whole in wholes if (fit := whole.fit()) is not None and fit.loss < _HOPELESS}
    layers = {whole.path: layer_of(model, whole, fits[whole.path]) for whole in wholes if whole.path in fits}
    losses = losses_with(model, layers, batches, progress=progress)
    good = [(whole, losses[whole.path]) for whole in wholes if losses.get(whole.path, _HOPELESS) < _HOPELESS]
    paths = {whole.path for whole, _ in good}
    parents = {whole.path: whole.inside for whole in wholes}

    def around(path: str) -> str:
        while path and path not in paths:
            path = parents[path]
        return path

    home = {name: whole.path for whole in wholes for name in whole.sites}  # the innermost comes last
    found = [replace(group, inside=around(home.get(group.sites[0], ""))) for group in groups]
    for whole, loss in good:
        linear = SiteChoice(whole.path, 0, min(whole.inputs, whole.outputs), WHOLE)
        stay = SiteChoice(whole.path, 0, form="unchanged")
        inner = [other for other, _ in good if around(other.inside) == whole.path]
        direct = [group.stay for group in found if group.inside == whole.path]
        own = whole.flops - sum(other.flops for other in inner) - sum(option.flops for option in direct)
        params = whole.params - sum(other.params for other in inner) - sum(option.params for option in direct)
        options = (
            Option((stay,), 0.0, max(0.0, own), max(0.0, params), 0.0),
            Option((linear,), loss, whole.least, float((whole.inputs + 1) * whole.outputs), 0.0),
        )
        found.append(Group((whole.path,), options, inside=around(whole.inside), module=True))
    return found


def with_module_latencies(
    original: nn.Module,
    groups: Sequence[Group],
    wholes: Mapping[str, Whole],
    shares: Shares,
    *,
    batch: int,
    rounds: int = 7,
) -> list[Group]:
    """The groups with measured latencies for modules, too, as shares of the whole model's.

    Args:
        original: the model as it came, with the same paths.
        groups: of which those of sites have latencies.
        wholes: by path.
        shares: of the model's time, by path.
        batch: size of the example batch.
        rounds: measurements of each.

    For a module that cannot be run by itself, FLOPs tell what the map would take of its time.
    """
    inner: dict[str, float] = {}  # time of what is inside, by module
    known: dict[str, Group] = {}
    for group in groups:
        if not group.module:
            inner[group.inside] = inner.get(group.inside, 0.0) + group.stay.cost("latency")
    for group in sorted((g for g in groups if g.module), key=lambda g: -len(g.sites[0].split("."))):  # innermost first
        whole, (stay, linear) = wholes[group.sites[0]], group.options
        found = [0.0, 0.0]
        for size, share in shares.get(whole.path, {}).items():
            ratio = _ratio(original, whole, size, batch, rounds)
            found = [found[0] + share, found[1] + share * (linear.flops / whole.flops if ratio is None else ratio)]
        present, other = (value / max(1, len(shares.get(whole.path, {}))) for value in found)
        held = inner.get(whole.path, 0.0)
        own = max(0.0, present - held)
        inner[group.inside] = inner.get(group.inside, 0.0) + held + own
        options = (replace(stay, latency=own), replace(linear, latency=min(other, held + own)))
        known[whole.path] = replace(group, options=options)
    return [known[group.sites[0]] if group.module else group for group in groups]


def _ratio(original: nn.Module, whole: Whole, size: int, batch: int, rounds: int) -> float | None:
    """Time of the map that would stand for a module, relative to the module's own."""
    if whole.shape[0] % batch:
        return None
    module = original.get_submodule(whole.path)
    like = next(parameter for parameter in module.parameters() if parameter.is_floating_point())
    x = torch.randn((whole.shape[0] // batch * size, *whole.shape[1:]), dtype=like.dtype, device=like.device)
    layer = build(whole.spec, module).to(like.device, like.dtype)
    kwargs = {whole.keyword: x} if whole.keyword else {}
    args = () if whole.keyword else (x,)
    with evaluating(module, layer):
        try:
            out = module(*args, **kwargs)
        except Exception:  # it may want to be told more than it does by itself
            return None
        out = out[0] if whole.nones and isinstance(out, tuple) else out
        made = layer(x)
        if not isinstance(out, Tensor) or out.shape != (made[0] if whole.nones else made).shape:
            return None
        runs: dict[str, Any] = {"module": lambda: module(*args, **kwargs), "map": lambda: layer(x)}
        samples = interleaved(runs, like.device, rounds, 2)
    ratios = torch.tensor(samples["map"]) / torch.tensor(samples["module"])
    return float(ratios.median())
