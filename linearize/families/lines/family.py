"""The family "lines": channels follow their fitted line, for budgets in nonlinear units."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from linearize.families.family import Context, Family, Layers, Movable
from linearize.families.lines.collect import UnitCollector, sensitivities_of
from linearize.families.lines.moving import movable
from linearize.families.lines.options import LINE, unit_costs, unit_groups, with_lines
from linearize.families.option import Group, Option, SiteChoice
from linearize.gating.gate import gates
from linearize.plan import Form
from linearize.running.passes import Collector

__all__ = ["LinePlaces", "Lines"]


@dataclass
class LinePlaces:
    """All gates, if the budget is in nonlinear units.

    Attributes:
        collectors: one for each gate.
        costs: by site name, what each channel costs the output if it goes to its line, (C,).
    """

    collectors: list[UnitCollector]
    costs: dict[str, Tensor] = field(default_factory=dict)


def _told(keep: int, rank: int) -> str:
    return f"keep {keep}, lines"


class Lines(Family):
    """Channels follow their line in place. This changes no width, and no cost except nonlinear units."""

    name = "lines"
    forms: tuple[Form, ...] = (Form(LINE, _told, replaces=False),)

    def find(self, context: Context) -> LinePlaces:
        """Find every gate."""
        if context.measure != "activations":
            return LinePlaces([])
        return LinePlaces([UnitCollector(name, gate) for name, gate in gates(context.gated).items()])

    def collectors(self, context: Context, places: LinePlaces) -> Sequence[Collector]:
        """The sensitivity to an error in each channel."""
        return places.collectors

    def options(self, context: Context, places: LinePlaces, groups: Sequence[Group]) -> list[Group]:
        """Options that put a number of channels on their lines. None where widths must be equal, or layers stock."""
        if not places.collectors:
            return list(groups)
        found, named = sensitivities_of(places.collectors), gates(context.gated)
        places.costs = {name: unit_costs(gate, context.calibration[name], found[name]) for name, gate in named.items()}
        if context.stock:
            return list(groups)
        return with_lines(groups, unit_groups(context.gated, places.costs), barred=context.tied)

    def layers(self, model: nn.Module, places: LinePlaces, group: Group, option: Option) -> Layers:
        """Never called, because no latency is measured for budgets in units."""
        raise ValueError("lines in place have no latency of their own")

    def movable(
        self,
        model: nn.Module,
        context: Context,
        places: LinePlaces,
        group: Group,
        choices: Mapping[str, SiteChoice],
    ) -> Movable | None:
        """Any channels of gates whose others follow their line already, or that are as they were."""
        own = set(group.sites) <= places.costs.keys() & gates(model).keys() and not set(group.sites) & context.tied
        if not own or context.stock or any(choice.form != LINE for choice in choices.values()):
            return None
        return movable(model, places.costs, group)

    def apply(
        self,
        model: nn.Module,
        context: Context,
        places: LinePlaces,
        choices: Mapping[str, SiteChoice],
        keep: Mapping[str, Tensor],
    ) -> None:
        """Make the cheapest channels linear."""
        named = gates(model)
        for name, choice in choices.items():
            order = places.costs[name].argsort(stable=True)
            mask = torch.zeros(named[name].channels, dtype=torch.bool)
            mask[order[: named[name].channels - choice.keep]] = True
            named[name].linearize_(mask)
