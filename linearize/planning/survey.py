"""A survey: everything known about a model before a decision: options with costs and losses, and totals."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from linearize.cost import Cost
from linearize.families.family import Assembled, Context, Layers
from linearize.families.option import Group, Measure, Option
from linearize.families.registry import family_of
from linearize.planning.knapsack import choose
from linearize.report.trial import Trial

__all__ = ["Survey", "descriptions"]


@dataclass
class Survey:
    """Everything that could be done to a model.

    Attributes:
        context: the converted model with its original weights and fitted lines, and what options were asked for.
        measure: what the budget limits.
        groups: options with costs and losses.
        total: the whole original model's cost in that measure, for the example batch; 1 for latency.
        before: parameters and FLOPs of the original.
        places: by the name of a family, where it applies; only the family itself looks inside.
        trials: plans that were tried with the real loss.
        also: totals in the measures of further budgets.
    """

    context: Context
    measure: Measure
    groups: list[Group]
    total: float
    before: Cost
    places: dict[str, Any] = field(default_factory=dict)
    trials: tuple[Trial, ...] = ()
    also: dict[Measure, float] = field(default_factory=dict)

    @property
    def gated(self) -> nn.Module:
        """The converted model."""
        return self.context.gated

    @property
    def notes(self) -> list[str]:
        """Remarks for the report, such as too little data."""
        return [*self.context.warned, *self.context.told]

    @property
    def totals(self) -> dict[Measure, float]:
        """The original's cost in every measure that a budget limits."""
        return {self.measure: self.total, **self.also}

    @property
    def fixed(self) -> float:
        """The part of the total that no option changes."""
        return self.fixed_of(self.measure)

    def fixed_of(self, measure: Measure) -> float:
        """The part of the cost, in this measure, that no option changes."""
        return self.totals[measure] - sum(group.stay.cost(measure) for group in self.groups)

    def limits(self, fractions: Mapping[Measure, float]) -> dict[Measure, float]:
        """What the options may cost together in each measure, for fractions of the totals."""
        return {measure: share * self.totals[measure] - self.fixed_of(measure) for measure, share in fractions.items()}

    def share(self, measure: Measure, options: Iterable[Option]) -> float:
        """The fraction of the original's cost that some options leave, as predicted."""
        return (self.fixed_of(measure) + sum(option.cost(measure) for option in options)) / self.totals[measure]

    @property
    def least(self) -> float:
        """The smallest fraction of the total that the options can reach, as predicted."""
        return self.least_of(self.measure)

    def least_of(self, measure: Measure) -> float:
        """The smallest fraction, in this measure, that the options can reach."""
        return self.share(measure, choose(self.groups, measure, -math.inf).options)

    def layers(self, group: Group, option: Option) -> Layers:
        """The layers that an option would leave, to be timed."""
        family = family_of(option.choices[0].form)
        return family.layers(self.gated, self.places[family.name], group, option)

    def together(self, group: Group, layers: Layers | None) -> Assembled | None:
        """Layers of a group, or those that are there, as one module of the group's input; None if they cannot be."""
        families = {family_of(c.form).name: family_of(c.form) for option in group.options for c in option.choices}
        made = (own.together(self.gated, self.places[name], group, layers) for name, own in families.items())
        return next((assembled for assembled in made if assembled is not None), None)

    @property
    def reasons(self) -> dict[str, str]:
        """By name, the reason of each site that stays for another reason than its loss."""
        found: dict[str, str] = {}
        for group in self.groups:
            cheaper = any(o.cost(m) < group.stay.cost(m) for o in group.options[1:] for m in self.totals)
            why = group.reason or (None if cheaper else "no other option costs less")
            found |= dict.fromkeys(() if group.encloses or why is None else group.sites, str(why))
        return found


def descriptions(groups: Sequence[Group], measure: Measure) -> Mapping[str, str]:
    """Per group, its best options as a table."""
    return {", ".join(group.sites): str(group.pareto(measure)) for group in groups}
