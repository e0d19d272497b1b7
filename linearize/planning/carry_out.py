"""Carry out choices on a copy of the gated model, make the plan of its collapse, and collapse it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor, nn

from linearize.collapse import collapse
from linearize.errors import CollapseError
from linearize.families import registry
from linearize.families.option import SiteChoice
from linearize.families.registry import family_of
from linearize.gating.gate import gates
from linearize.plan import UNCHANGED, Plan, SitePlan
from linearize.planning.knapsack import Choice
from linearize.planning.survey import Survey
from linearize.running.copies import duplicate
from linearize.sites.record import Record, record_of, set_record
from linearize.surgery.form_choice import make_plan
from linearize.zoo.layers import close_up

__all__ = ["carry_out_choices", "collapsed", "edited", "explained", "planned", "replaced", "site_choices"]


def site_choices(choice: Choice) -> dict[str, SiteChoice]:
    """The choices that change anything, by site name."""
    each = [c for option in choice.options for c in option.choices]
    return {c.site: c for c in each if c.form != UNCHANGED}


def replaced(choices: Mapping[str, SiteChoice]) -> dict[str, SiteChoice]:
    """The choices that replace the modules of a site, so that no gate is left."""
    return {name: choice for name, choice in choices.items() if choice.replaces}


def edited(found: Survey, choices: Mapping[str, SiteChoice], keep: Mapping[str, Tensor] | None = None) -> nn.Module:
    """A copy of the gated model with the choices carried out. `keep` overrides which channels stay."""
    model = duplicate(found.gated, CollapseError)
    carry_out_choices(found, model, choices, keep)
    return model


def carry_out_choices(
    found: Survey, model: nn.Module, choices: Mapping[str, SiteChoice], keep: Mapping[str, Tensor] | None = None
) -> None:
    """Carry the choices out on `model`, a gated copy, in place."""
    for family in registry.FAMILIES:
        own = {name: choice for name, choice in choices.items() if family_of(choice.form) is family}
        if own:
            family.apply(model, found.context, found.places[family.name], own, keep or {})


def collapsed(gated: nn.Module, plan: Plan) -> nn.Module:
    """The model in its planned state, collapsed as planned, in eval mode. Replaced blocks need nothing more."""
    named = gates(gated)
    if not named:
        small = duplicate(gated, CollapseError).eval()
        record = record_of(gated) or Record()
        set_record(small, Record((), record.steps, record.inputs))
        close_up(small)
        return small
    return collapse(gated, plan=Plan(tuple(site for site in plan.sites if site.site in named))).eval()


def explained(plan: Plan, found: Survey) -> Plan:
    """The plan, with the reason for every site that stays for another reason than its loss."""
    reasons = found.reasons
    return Plan(
        tuple(
            replace(site, reason=reasons.get(site.site)) if site.form == UNCHANGED and not site.reason else site
            for site in plan.sites
        )
    )


def planned(gated: nn.Module, choices: Mapping[str, SiteChoice], choice: Choice | None = None) -> Plan:
    """The plan for collapsing a model in its planned state, in the chosen forms."""
    losses: dict[str, float] = {}
    for option in choice.options if choice is not None else ():
        for c in option.choices:
            losses[c.site] = option.loss / len(option.choices)
    named = gates(gated)
    sites = [
        SitePlan(
            c.site, c.form, c.gone, rank=c.rank, loss=losses.get(c.site, 0.0), dropped=c.gone,
            channels=c.keep + len(c.gone) if c.gone else 0,
        )
        for c in replaced(choices).values()
    ]  # fmt: skip
    for site in make_plan(gated).sites if named else ():
        chosen = choices.get(site.site)
        if chosen is not None:
            site = family_of(chosen.form).entry(site, chosen, named[site.site])  # noqa: PLW2901
        sites.append(replace(site, loss=losses.get(site.site, 0.0)))
    record = record_of(gated) or Record()
    order = {site.name: position for position, site in enumerate(record.sites)}
    return Plan(tuple(sorted(sites, key=lambda site: order.get(site.site, len(order)))))
