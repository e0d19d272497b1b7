"""Channels that gates may put on their lines in training, for budgets in nonlinear units.

Shape letters: C channels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from linearize.families.family import Movable
from linearize.families.lines.options import LINE
from linearize.families.option import Group, SiteChoice
from linearize.gating.gate import ChannelGate, gates
from linearize.training.slots import Slot

__all__ = ["movable"]


@torch.no_grad()
def movable(model: nn.Module, costs: Mapping[str, Tensor], group: Group) -> Movable:
    """All channels of a group's gates, which are freed for it; none of a gate that no batch reached.

    Args:
        model: gated.
        costs: by site, what each channel costs the output on its line, (C,).
        group: of the survey.
    """
    named = gates(model)
    slots, gone = [], {}
    for name in group.sites:
        gate = named[name]
        known = bool(costs[name].isfinite().all())
        none = torch.zeros(gate.channels, dtype=torch.bool)
        counts = range(gate.channels + 1) if known else (0,)
        slots.append(Slot(name, tuple(counts), costs[name].nan_to_num(posinf=0.0), none))
        gone[name] = gate.linear.cpu() if known else none
        if known:
            gate.frozen.zero_()

    def choices(counts: Sequence[int]) -> tuple[SiteChoice, ...]:
        return tuple(
            SiteChoice(name, named[name].channels - count, form=LINE)
            for name, count in zip(group.sites, counts, strict=True)
        )

    def price(counts: Sequence[int]) -> tuple[float, float, float]:
        left = [
            _positions(named[name]) * (named[name].channels - count)
            for name, count in zip(group.sites, counts, strict=True)
        ]
        return group.stay.flops, group.stay.params, float(sum(left))

    return Movable(tuple(slots), choices, price, gone)


def _positions(gate: ChannelGate) -> float:
    return float(gate.site.positions) if gate.site is not None else 1.0
