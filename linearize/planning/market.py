"""What may move between sites in training, and what each state of it costs: prices as planning has them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from linearize.algebra.piece import Infeasible
from linearize.families import registry
from linearize.families.family import Movable
from linearize.families.option import Group, Measure, SiteChoice
from linearize.planning.survey import Survey
from linearize.training.slots import Slot

__all__ = ["Market", "market_of", "without_idle_biases"]

_LEAST = 1e-12  # share of the cost: what a channel saves at least, so that nothing is divided by zero


@dataclass
class Market:
    """Groups of which channels may go and come back.

    Attributes:
        measure: what the budget limits.
        total: cost of the original in it.
        members: the groups, with what may move in each.
        slots: all of them, with what a channel saves in shares of the cost.
        offset: share of the cost of everything else.
    """

    measure: Measure
    total: float
    members: Sequence[tuple[Group, Movable]]
    slots: Sequence[Slot]
    offset: float = 0.0

    def price(self, gone: Mapping[str, int]) -> float:
        """The share of the cost that is left for numbers of channels that are gone, by slot."""
        return self.offset + sum(_cost(self.measure, *member, gone) for member in self.members) / self.total

    @property
    def gone(self) -> dict[str, Tensor]:
        """By slot, the channels that are gone at the start."""
        return {name: mask for _, movable in self.members for name, mask in movable.gone.items()}

    def choices(self, gone: Mapping[str, Tensor]) -> dict[str, SiteChoice]:
        """By site, what is chosen in a state; only what changes anything."""
        found: dict[str, SiteChoice] = {}
        for group, movable in self.members:
            counts = [int(gone[slot.name].sum()) for slot in movable.slots]
            whole = {choice.site: choice.keep for choice in group.stay.choices}
            made = movable.choices(counts)
            found |= {c.site: c for c in made if c.rank or c.keep != whole.get(c.site, c.keep)}
        return found


def market_of(found: Survey, model: nn.Module, choices: Mapping[str, SiteChoice]) -> Market:
    """Collect the channels that gates may remove or restore during training, by groups that a family can move.

    Args:
        found: the survey.
        model: gated; it is prepared, see `Family.movable`.
        choices: by site, what was carried out on it, or how channels are to go.
    """
    members: list[tuple[Group, Movable]] = []
    for group in found.groups:
        own = {site: choices[site] for site in group.sites if site in choices}
        for family in registry.FAMILIES:
            if family.name not in found.places:
                continue
            movable = family.movable(model, found.context, found.places[family.name], group, own)
            if movable is not None:
                members.append((group, movable))
                break
    slots = [
        replace(slot, saving=_saving(found, group, movable, slot))
        for group, movable in members
        for slot in movable.slots
    ]
    return Market(found.measure, found.total, members, slots)


def _saving(found: Survey, group: Group, movable: Movable, slot: Slot) -> float:
    """The share of the cost that one channel of a slot saves, if all go that may."""
    none = {other.name: 0 for other in movable.slots}
    costs = [_cost(found.measure, group, movable, none | {slot.name: count}) for count in (0, slot.most)]
    return max(_LEAST, (costs[0] - costs[1]) / max(1, slot.most) / found.total)


def _cost(measure: Measure, group: Group, movable: Movable, gone: Mapping[str, int]) -> float:
    """Of a group. Its latency is that of options of as many FLOPs: in between, and never falling with them."""
    try:
        flops, params, units = movable.costs([gone[slot.name] for slot in movable.slots])
    except Infeasible:  # such a state is possible, and saves nothing
        return group.stay.cost(measure)
    if measure != "latency":
        return {"flops": flops, "params": params, "activations": units}[measure]
    known = sorted((option.flops, option.cost("latency")) for option in group.options)
    heights = np.maximum.accumulate([latency for _, latency in known])
    return float(np.interp(flops, [size for size, _ in known], heights))


@torch.no_grad()
def without_idle_biases(model: nn.Module, original: nn.Module) -> None:
    """Take off the biases that layers got for taking over from channels, where none went; the others are to stay."""
    modules: Mapping[str, Any] = dict(original.named_modules())
    for path, module in model.named_modules():
        bias, before = module._parameters.get("bias"), modules.get(path)
        if bias is None or before is None or before._parameters.get("bias", 0) is not None:
            continue
        if bool((bias == 0).all()):
            module.bias = None
        else:
            bias.requires_grad_(bool(getattr(module, "weight", bias).requires_grad))
