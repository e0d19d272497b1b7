"""Gates that decide for a budget: where they start, how prices are set right, and what becomes of them.

Training itself is somebody else's: it adds the prior's penalty to the loss, and calls its `step`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from linearize.errors import CollapseError
from linearize.families.option import Group, SiteChoice
from linearize.gating.gate import gates
from linearize.plan import Plan
from linearize.planning.budget import Budget
from linearize.planning.carry_out import collapsed, planned, replaced, site_choices
from linearize.planning.knapsack import choose
from linearize.planning.market import Market, market_of, without_idle_biases
from linearize.planning.settle import Gauges, fraction_of, is_met
from linearize.planning.survey import Survey
from linearize.running.copies import duplicate
from linearize.training.cost_prior import CostPrior

__all__ = ["Deciding", "Ending", "from_nothing", "from_plan"]

_ROUNDS = 6  # of prices moved, or of a stricter aim, after a miss
_RIGHT = 0.01  # a price no further off than this share of the original's cost was right


@dataclass(frozen=True)
class Ending:
    """A model whose gates are decided, its plan, the same collapsed, and the share of the cost that is left."""

    gated: nn.Module
    plan: Plan
    small: nn.Module
    reached: float
    met: bool


@dataclass
class Deciding:
    """One compression by gates.

    Attributes:
        found: the survey.
        budget: what may remain.
        model: gated, in its state at the start; it is the one to be trained.
        fixed: by site, the choices that were carried out and do not change any more.
        market: what may move.
        planned: whether it starts from a plan.
        batch: for which costs are counted.
        gauges: what tells costs that are not counted for the batch, by measure.
        say: told what is going on.
    """

    found: Survey
    budget: Budget
    model: nn.Module
    fixed: Mapping[str, SiteChoice]
    market: Market
    planned: bool
    batch: Any
    gauges: Gauges = field(default_factory=dict)
    say: Callable[[str], None] = lambda _: None

    def prior(self, steps: int) -> CostPrior:
        """The prior of a training in which so many steps decide."""
        return self._prior(self.model, steps)

    def _prior(self, model: nn.Module, steps: int) -> CostPrior:
        gone, aim = self.market.gone if self.planned else None, self.budget.fraction
        return CostPrior(model, self.market.slots, self.market.price, aim=aim, steps=steps, gone=gone)

    def rehearse(self) -> tuple[CostPrior, Ending]:
        """All decided before any training. Prices are moved by what they promise wrongly, until the budget is met.

        They are exact but for what only collapsing shows; latencies are promises.
        """
        for last in range(_ROUNDS):
            prior = self._prior(duplicate(self.model, CollapseError), 1)
            prior.finish()
            end = self._ending(prior)
            wrong = end.reached - prior.share
            if last == _ROUNDS - 1 or (end.met and abs(wrong) < _RIGHT) or _all_gone(prior):
                break
            self.market.offset += wrong
        return prior, end

    def end(self, prior: CostPrior) -> Ending:
        """What becomes of a model whose gates are decided, with more channels gone as long as the budget is missed."""
        found = self._ending(prior)
        for _ in range(_ROUNDS):
            if found.met or _all_gone(prior):
                break
            prior.finish(prior.aim - (found.reached - self.budget.fraction) * 1.1 - 1e-4)
            found = self._ending(prior)
        return found

    def _ending(self, prior: CostPrior) -> Ending:
        model = duplicate(prior.model, CollapseError)
        without_idle_biases(model, self.found.gated)
        choices = {**self.fixed, **self.market.choices(prior.gone)}
        plan = planned(model, choices)
        try:
            small = collapsed(model, plan)
        except CollapseError:  # the forms chosen do not go together: let collapsing choose
            plan = planned(model, replaced(choices))
            small = collapsed(model, plan)
        reached = fraction_of(self.found, self.budget, model, small, self.batch, self.gauges)
        self.say(f"  promised {prior.share:.3f}, reached {reached:.3f} of the original's {self.budget.measure}")
        return Ending(model, plan, small, reached, is_met(self.budget, reached))


def from_plan(
    found: Survey,
    budget: Budget,
    goal: nn.Module,
    choices: Mapping[str, SiteChoice],
    reached: float | None,
    **around: Any,
) -> Deciding:
    """Start in the state of a plan.

    Args:
        found: the survey.
        budget: what may remain.
        goal: gated, with the choices carried out. It is prepared, and will be trained.
        choices: by site.
        reached: the share of the cost that is left in this state, if it is known.
        around: further fields of `Deciding`.
    """
    market = market_of(found, goal, choices)
    moving = {site for group, _ in market.members for site in group.sites}
    fixed = {site: choice for site, choice in choices.items() if site not in moving}
    _set_offset(market, 1.0 if reached is None else reached)
    return Deciding(found, budget, goal, fixed, market, planned=True, **around)


def from_nothing(found: Survey, budget: Budget, **around: Any) -> Deciding:
    """Start with a copy of the model as it came."""
    model = duplicate(found.gated, CollapseError)
    market = market_of(found, model, _directions(found, budget))
    _set_offset(market, 1.0)
    return Deciding(found, budget, model, {}, market, planned=False, **around)


def _set_offset(market: Market, share: float) -> None:
    """Let the price at the start be right."""
    market.offset = share - market.price({name: int(mask.sum()) for name, mask in market.gone.items()})


def _directions(found: Survey, budget: Budget) -> dict[str, SiteChoice]:
    """The sites whose channels go to their line: where the table's best choice in the budget is one full linear map.

    All others lose channels for good. At equal numbers that costs less, and predicted losses say what is worth more.
    """

    def plain(group: Group) -> Group:
        good = [o for o in group.options[1:] if all(c.of_one_kind for c in o.choices) and not group.encloses]
        return replace(group, options=(group.stay, *good))

    picked = choose([plain(g) for g in found.groups], found.measure, budget.fraction * found.total - found.fixed)
    known = gates(found.gated)
    return {site: choice for site, choice in site_choices(picked).items() if choice.rank and site in known}


def _all_gone(prior: CostPrior) -> bool:
    return all(int(prior.gone[name].sum()) >= slot.most for name, slot in prior.slots.items())
