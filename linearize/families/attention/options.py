"""Options of attentions: one linear map, or nothing. What they lose is measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from linearize.families.enclosing import enclosed
from linearize.families.modules.apply import layer_of
from linearize.families.modules.fit import WholeFit
from linearize.families.modules.place import Whole
from linearize.families.option import Group, Option, SiteChoice
from linearize.surgery.specs import Spec, build
from linearize.training.distance import losses_with_all

__all__ = ["ATTENTION", "silence", "with_attentions"]

ATTENTION = "attention gone"
_HOPELESS = 1.0  # a loss as bad as an output of zeros, or a nat of divergence


def silence(whole: Whole) -> Spec:
    """The description of a layer that gives zeros in the place of an attention."""
    return {"type": "Silent", "keyword": whole.keyword, "nones": whole.nones}


def with_attentions(
    groups: Sequence[Group],
    wholes: Sequence[Whole],
    fits: Mapping[str, WholeFit],
    model: nn.Module,
    batches: Sequence[Any],
    homes: Mapping[str, Sequence[str]],
    *,
    maps: bool = True,
    progress: bool = False,
) -> list[Group]:
    """The groups, with one for each attention that may go, around that of its heads.

    Args:
        groups: so far.
        wholes: observed.
        fits: maps by path.
        model: gated.
        batches: on which losses are measured.
        homes: by site, the paths of all that belongs to its group.
        maps: whether maps are offered, besides nothing.
        progress: show a bar.
    """
    standing: dict[str, dict[str, nn.Module]] = {}
    for whole in wholes:
        old = model.get_submodule(whole.path)
        if whole.path in fits and maps:
            standing[f"{whole.path} map"] = {whole.path: layer_of(model, whole, fits[whole.path])}
        if whole.inputs == whole.outputs:
            standing[f"{whole.path} nothing"] = {whole.path: build(silence(whole), old)}
    losses = losses_with_all(model, standing, batches, progress=progress)
    least = {w.path: min(losses.get(f"{w.path} {kind}", _HOPELESS) for kind in ("map", "nothing")) for w in wholes}
    dearest = max(least, key=least.__getitem__, default="")
    found = list(groups)
    for whole in wholes:
        if (whole.caches and whole.path == dearest) or any(_cuts(whole, group) for group in groups):
            continue  # one attention stays, by which a cache tells how long it is
        rank = min(whole.inputs, whole.outputs)
        choices = {
            "map": SiteChoice(whole.path, 0, rank, ATTENTION),
            "nothing": SiteChoice(whole.path, 0, 0, ATTENTION, (0,)),
        }
        costs = {"map": (whole.least, float(whole.outputs * (whole.inputs + whole.bias))), "nothing": (0.0, 0.0)}
        options = [
            Option((choice,), losses[f"{whole.path} {kind}"], *costs[kind], 0.0)
            for kind, choice in choices.items()
            if losses.get(f"{whole.path} {kind}", _HOPELESS) < _HOPELESS
        ]
        stay = Option((SiteChoice(whole.path, 0, form="unchanged"),), 0.0, whole.flops, whole.params, 0.0)
        if options:
            group = Group((whole.path,), (stay, *options), gone_form=ATTENTION, encloses=True, shape=whole.shape)
            found = enclosed(found, group, homes)
    return found


def _cuts(whole: Whole, group: Group) -> bool:
    """True if a group changes modules both inside and outside."""
    inside = [part.startswith(f"{whole.path}.") for part in group.touches]
    return any(inside) and not all(inside)
