"""The groups of sites of a model, and the options of each with their costs and predicted losses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product
from typing import Any

from torch import nn

from linearize.algebra.piece import Infeasible
from linearize.families.channels.editable import obstacle_to_refit
from linearize.families.channels.fit import Curve, levels
from linearize.families.option import Group, Option, SiteChoice
from linearize.families.price import Pricer
from linearize.gating.gate import gates
from linearize.gating.groups import groups_of
from linearize.plan import NARROWED
from linearize.running.progress import progress_bar
from linearize.surgery.narrow import coupled_sites

__all__ = ["group_options", "slots_of"]

Choices = tuple[tuple[SiteChoice, ...], float]  # of sites that are decided together, and the loss

# Ranks of a skip between none and the full one.
_RANKS = (8, 16, 32, 64, 128, 256)


def group_options(
    model: nn.Module,
    curves: Mapping[str, Curve],
    *,
    round_to: int | None = None,
    barred: Mapping[str, str] | None = None,
    progress: bool = False,
) -> list[Group]:
    """The options of every group of a gated model.

    Args:
        model: gated, with its original weights.
        curves: by site name; a site without one stays as it is.
        round_to: numbers of channels that stay are multiples of this; None decides by site, see `levels`.
        barred: why some sites without a curve have none, by name.
        progress: show a bar: wide convolutions take seconds each.
    """
    found = []
    known: dict[Any, Any] = {}
    together = groups_of(model)
    with progress_bar("options", len(together), enabled=progress) as advance:
        for some in together:
            pricer = Pricer(model, [gates(model)[name] for name in some], known)
            found.append(_group(pricer, some, curves, round_to, barred or {}))
            advance(some[-1])
    return found


def _group(
    pricer: Pricer, names: list[str], curves: Mapping[str, Curve], round_to: int | None, barred: Mapping[str, str]
) -> Group:
    model, named = pricer.model, gates(pricer.model)
    before = pricer.before()
    choices = tuple(SiteChoice(name, named[name].channels, form="unchanged") for name in names)
    stay = Option(choices, 0.0, before.flops, before.params, before.activations)
    shape = curves[names[0]].observation.shape if names[0] in curves else ()
    slots = slots_of(model, names)
    missing = next((slot[-1] for slot in slots if slot[-1] not in curves), None)
    if missing is not None:
        why = obstacle_to_refit(model, named[missing].site) or barred.get(missing, "no batch reached it")
        told = why if len(names) == 1 else f"it shares maps with {missing}: {why}"
        return Group(tuple(names), (stay,), told, shape=shape)
    lists = [_slot_choices(slot, curves[slot[-1]], round_to, alone=len(slots) == 1) for slot in slots]
    options, why = [stay], "no other width and form are left to choose from"
    for together in _joined(lists):
        some = tuple(sorted((c for choices, _ in together for c in choices), key=lambda c: names.index(c.site)))
        try:
            costs = pricer.costs(some)
        except Infeasible as error:
            why = str(error)
            continue
        loss = sum(loss for _, loss in together)
        options.append(Option(some, loss, *costs))
    return Group(tuple(names), tuple(options), None if len(options) > 1 else why, shape=shape)


def slots_of(model: nn.Module, names: Sequence[str]) -> list[tuple[str, ...]]:
    """The sites of a group, those of a chain through a depthwise map together: they keep the same channels."""
    named = gates(model)
    upper = {chain.lower.name: chain.upper.name for chain in coupled_sites(model, (named[name].site for name in names))}
    return [(upper[name], name) if name in upper else (name,) for name in names if name not in upper.values()]


def _slot_choices(slot: tuple[str, ...], curve: Curve, round_to: int | None, *, alone: bool) -> list[Choices]:
    """What can happen to a site, or to the two of a chain, with the predicted loss.

    Beside others in its group, a site can also keep all channels, but gets no skip, which would need the shared map.
    """
    found: list[Choices] = [
        ((choice,), loss) for choice, loss in curve.choices(levels(curve.channels, round_to), _RANKS)
    ]
    if len(slot) == 1 and alone:
        return found
    plain = [(choices[0], loss) for choices, loss in found if not choices[0].rank and choices[0].keep]
    if not alone and plain:
        plain.insert(0, (SiteChoice(slot[-1], curve.channels), 0.0))
    if len(slot) == 1:
        return [((choice,), loss) for choice, loss in plain]
    return [(tuple(replace(choice, site=name, form=NARROWED) for name in slot), loss) for choice, loss in plain]


def _joined(lists: list[list[Choices]]) -> list[tuple[Choices, ...]]:
    """The options of sites that are priced together.

    Every combination for two; a coarser choice of them for three; for more, equal shares and one site at a time.
    """
    if len(lists) <= 2:
        return list(product(*lists))
    if len(lists) == 3:
        return list(product(*(some[:1] + some[1::2] for some in lists)))
    shortest = min(map(len, lists))
    equal = list(zip(*(some[:shortest] for some in lists), strict=True))
    for index, some in enumerate(lists):
        stay = [other[0] if other else None for other in lists]
        for option in some[1:]:
            one = [option if i == index else other for i, other in enumerate(stay)]
            equal.append(tuple(o for o in one if o is not None))
    return equal
