"""The options of whole modules, and how they combine with options of the sites inside."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from linearize.families.modules.apply import layer_of
from linearize.families.modules.fit import fit_whole
from linearize.families.modules.place import Whole
from linearize.families.option import Group, Option, SiteChoice
from linearize.training.distance import losses_with

__all__ = ["WHOLE_MODULE", "with_modules"]

WHOLE_MODULE = "whole module"
_HOPELESS = 1.0  # a loss as bad as an output of zeros, or a nat of divergence


def with_modules(
    groups: Sequence[Group],
    wholes: Sequence[Whole],
    model: nn.Module,
    batches: Sequence[Any],
    *,
    progress: bool = False,
) -> list[Group]:
    """The groups of sites with the module that they are in, and a group for each module that could be replaced.

    What it costs to leave a module as it is, is only what its groups and the modules inside do not count themselves.

    Args:
        groups: of sites.
        wholes: observed, outermost first.
        model: gated.
        batches: on which a module's loss is measured: how errors at many positions add up cannot be predicted.
        progress: show a bar.
    """
    parents = {whole.path: whole.inside for whole in wholes}
    wholes = [whole for whole in wholes if not any(_cuts(whole, group) for group in groups)]
    fits = {whole.path: fit for whole in wholes if (fit := fit_whole(whole)) is not None and fit.loss < _HOPELESS}
    layers = {whole.path: layer_of(model, whole, fits[whole.path]) for whole in wholes if whole.path in fits}
    losses = losses_with(model, layers, batches, progress=progress)
    good = [(whole, losses[whole.path]) for whole in wholes if losses.get(whole.path, _HOPELESS) < _HOPELESS]
    paths = {whole.path for whole, _ in good}

    def around(path: str) -> str:
        while path and path not in paths:
            path = parents[path]
        return path

    found = [replace(group, inside=around(_home(group, wholes)), gone_form=WHOLE_MODULE) for group in groups]
    for whole, loss in good:
        linear = SiteChoice(whole.path, 0, min(whole.inputs, whole.outputs), WHOLE_MODULE)
        stay = SiteChoice(whole.path, 0, form="unchanged")
        inner = [other for other, _ in good if around(other.inside) == whole.path]
        direct = [group.stay for group in found if group.inside == whole.path]
        own = whole.flops - sum(other.flops for other in inner) - sum(option.flops for option in direct)
        params = whole.params - sum(other.params for other in inner) - sum(option.params for option in direct)
        options = (
            Option((stay,), 0.0, max(0.0, own), max(0.0, params), 0.0),
            Option((linear,), loss, whole.least, float((whole.inputs + 1) * whole.outputs), 0.0),
        )
        found.append(
            Group(
                (whole.path,),
                options,
                inside=around(whole.inside),
                gone_form=WHOLE_MODULE,
                encloses=True,
                shape=whole.shape,
            )
        )
    return found


def _home(group: Group, wholes: Sequence[Whole]) -> str:
    """The innermost whole module that holds a group; the innermost comes last."""
    parts = group.touches
    if parts:
        return next((w.path for w in reversed(wholes) if all(part.startswith(f"{w.path}.") for part in parts)), "")
    return next((whole.path for whole in reversed(wholes) if group.sites[0] in whole.sites), "")


def _cuts(whole: Whole, group: Group) -> bool:
    """True if a group changes modules both inside and outside of a whole one: they exclude each other."""
    inside = [part.startswith(f"{whole.path}.") for part in group.touches]
    return any(inside) and not all(inside)
