"""A short search for a better plan with the real loss. Predicted losses are added up, which is not quite correct.

Each trial multiplies the predicted losses of the groups by random factors, chooses again within the same budget, and
measures the distance of the model's output to the original's on some batches. The best choice is kept. Before that,
each kind of option is left out in turn, because wrong predictions are often wrong for a whole kind.

Source of the idea: Frantar and Alistarh, "SPDY: Accurate Pruning with Speedup Guarantees", ICML 2022.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from linearize.errors import CollapseError
from linearize.families import registry
from linearize.families.option import Group, Measure, Option
from linearize.planning.carry_out import carry_out_choices, site_choices
from linearize.planning.knapsack import Choice
from linearize.planning.several import choose_within
from linearize.planning.survey import Survey
from linearize.report.trial import Trial
from linearize.running.copies import Workbench
from linearize.training.distance import Yardstick, some_of

__all__ = ["DEAR", "kinds", "searched", "unscaled", "without_forms"]

_SPREAD = 0.5  # of the logarithm of the factors
DEAR = 1e6  # a loss that nobody takes who has another choice


def searched(
    found: Survey,
    budget: float | Mapping[Measure, float],
    data: Iterable[Any],
    *,
    trials: int,
    batches: int = 4,
    seed: int = 0,
    say: Callable[[str], None] = lambda _: None,
) -> Survey:
    """The survey, with losses scaled so that its choice within a budget is the best of some by the real loss.

    Args:
        found: the survey; its own choice is the one to start from.
        budget: cost that the groups may have in all; by measure, if there are several budgets.
        data: re-iterable batches; some spread over all of it are used.
        trials: choices to try, besides those without the options of some families; 0 tries none of either.
        batches: number of batches to measure on.
        seed: of the factors.
        say: told what is going on.
    """
    generator = torch.Generator().manual_seed(seed)
    limits = budget if isinstance(budget, Mapping) else {found.measure: budget}
    race = _Race(found, limits, some_of(data, batches), say)
    best = found.groups
    race.wins(found.groups, "at the start")
    own = kinds()
    every = {" and ".join(own): [form for forms in own.values() for form in forms]} if len(own) > 1 else {}
    for name, forms in (own | every).items():
        others = without_forms(found.groups, forms)
        if trials and others != found.groups and race.wins(others, f"without {name}"):
            best = others
    start, factors = best, torch.zeros(len(found.groups), dtype=torch.float64)
    for trial in range(trials):
        step = torch.randn(len(found.groups), generator=generator, dtype=torch.float64) * _SPREAD
        scales = (factors + step).exp().tolist()
        scaled = [_scaled(group, scale) for group, scale in zip(start, scales, strict=True)]
        if race.wins(scaled, f"in trial {trial + 1}"):
            best, factors = scaled, factors + step
    return replace(found, groups=best, trials=tuple(race.trials))


class _Race:
    """Choices one after another, each measured as long as it can still win.

    The original runs once; all choices are carried out on one copy of the model, which is put back in between.
    """

    def __init__(
        self, found: Survey, limits: Mapping[Measure, float], batches: Sequence[Any], say: Callable[[str], None]
    ) -> None:
        self.found, self.limits, self.say = found, limits, say
        self.measure = Yardstick(found.gated, batches)
        self.bench = Workbench(found.gated, CollapseError)
        self.best: list[float] = []
        self.tried: set[tuple[Option, ...]] = set()
        self.trials: list[Trial] = []

    def wins(self, groups: list[Group], of: str) -> bool:
        """Whether the choice among these groups has the least real loss so far; not if it has been tried."""
        choice = unscaled(choose_within(groups, self.limits), self.found)
        if choice.options in self.tried:
            return False
        self.tried.add(choice.options)
        model = self.bench.fresh()
        carry_out_choices(self.found, model, site_choices(choice))
        losses = self.measure.losses(model, self.best)
        behind = len(losses) and losses[-1] == float("inf")
        self.say(f"  search: {'given up' if behind else f'{sum(losses):.4g}'} {of}")
        wins = not self.best or sum(losses) < sum(self.best)
        self.trials.append(Trial(of, None if behind else float(sum(losses)), wins=wins))
        if wins:
            self.best = losses
        return wins


def kinds() -> dict[str, list[str]]:
    """Kinds of options whose predicted losses may all be wrong together, by the names of their families."""
    own = {family.name: [form.name for form in family.forms if form.replaces] for family in registry.FAMILIES}
    return {name: forms for name, forms in own.items() if forms}


def _scaled(group: Group, scale: float) -> Group:
    return replace(group, options=tuple(replace(option, loss=option.loss * scale) for option in group.options))


def without_forms(groups: list[Group], forms: Sequence[str]) -> list[Group]:
    """The groups, with options of some forms at a loss that nobody takes who has another choice."""

    def dear(option: Option) -> Option:
        barred = any(choice.form in forms for choice in option.choices)
        return replace(option, loss=option.loss + DEAR) if barred else option

    return [replace(group, options=tuple(map(dear, group.options))) for group in groups]


def unscaled(picked: Choice, found: Survey) -> Choice:
    """The same options with the losses that were predicted for them."""
    known = {option.choices: option for group in found.groups for option in (*group.options, group.gone)}
    options = tuple(known[option.choices] for option in picked.options)
    return replace(picked, options=options, loss=sum(option.loss for option in options))
