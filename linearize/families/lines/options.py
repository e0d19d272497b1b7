"""Options for budgets in nonlinear units: which channels follow their line, whether they can be collapsed or not.

If the line of a channel has the mean squared residual e_c, the loss of the model's output is `e_c G_cc`. G_cc is the
Gauss-Newton sensitivity to an error in that channel. All channels of a site save the same number of units. So within a
site, channels are taken in the order of this product.

Source of the measure: Cho et al., "Selective Network Linearization for Efficient Private Inference", ICML 2022.

Shape letters: C channels, R rows.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from linearize.algebra.moments import SiteCalibration
from linearize.families.option import Group, Option, SiteChoice, frontier
from linearize.gating.gate import ChannelGate, gates

__all__ = ["LINE", "unit_costs", "unit_groups", "with_lines"]

LINE = "line"
_LEVELS = 64  # options of lines per group, at most


def unit_costs(gate: ChannelGate, calibration: SiteCalibration, sensitivity: Tensor) -> Tensor:
    """The loss of the output if a channel follows its line, for each channel: (C,) float64.

    A gate that nothing tells anything about costs infinitely much.
    """
    if not calibration.count:
        return torch.full((gate.channels,), torch.inf, dtype=torch.float64)
    return calibration.residual * sensitivity


def unit_groups(model: nn.Module, costs: Mapping[str, Tensor]) -> list[Group]:
    """A group per gate, with options for the number of its channels that stay nonlinear."""
    groups = []
    for name, gate in gates(model).items():
        positions = float(gate.site.positions) if gate.site is not None else 1.0
        channels, ordered = gate.channels, costs[name].sort().values
        loss = torch.cat((torch.zeros(1, dtype=torch.float64), ordered.cumsum(0)))
        steps = sorted({round(channels * i / _LEVELS) for i in range(_LEVELS + 1)}) if channels > _LEVELS else None
        options = [
            Option(
                (SiteChoice(name, channels - gone, form=LINE if gone else "unchanged"),),
                float(loss[gone]),
                0.0,
                0.0,
                positions * (channels - gone),
            )
            for gone in (steps or range(channels + 1))
            if bool(torch.isfinite(loss[gone]))
        ]
        groups.append(Group((name,), tuple(options), None if len(options) > 1 else "no batch reached it"))
    return groups


def with_lines(groups: Sequence[Group], lines: Sequence[Group], *, barred: Collection[str] = ()) -> list[Group]:
    """The groups with the options of `unit_groups` added to their own: some sites are refitted, others follow lines.

    Args:
        groups: of `candidates`; the sites of one may share maps, and get refits together.
        lines: one group per gate.
        barred: sites that must keep their widths, and get no lines.
    """
    of = {group.sites[0]: group for group in lines}
    found = []
    for group in groups:
        if barred and set(group.sites) & set(barred):
            found.append(group)
            continue
        options = _joined([of.pop(site) for site in group.sites])
        every = (group.stay, *group.options[1:], *options)
        reason = None if len(every) > 1 else group.reason
        found.append(replace(group, options=every, reason=reason))
    return [*found, *(group for group in of.values() if group.sites[0] not in barred)]


def _joined(groups: Sequence[Group]) -> list[Option]:
    """Options of several sites that do not depend on each other, without the one that changes nothing."""
    found = [Option((), 0.0, 0.0, 0.0, 0.0)]
    for group in groups:
        every = tuple(
            Option((*a.choices, *b.choices), a.loss + b.loss, 0.0, 0.0, a.activations + b.activations)
            for a in found for b in group.options
        )  # fmt: skip
        best = frontier(every, "activations")
        found = (
            [best[round(i * (len(best) - 1) / _LEVELS)] for i in range(_LEVELS + 1)] if len(best) > _LEVELS else best
        )
    return [option for option in found if any(choice.form == LINE for choice in option.choices)]
