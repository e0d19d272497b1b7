"""Carry choices out on a copy of the gated model, plan its collapse, and collapse it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from linearize.collapse import collapse
from linearize.errors import CollapseError
from linearize.families.blocks.block import replace_block
from linearize.families.channels.apply import carry_out
from linearize.families.modules.whole import replace_wholes
from linearize.families.option import BORDERED, WHOLE, SiteChoice
from linearize.gating.gate import gates
from linearize.plan import Plan, SitePlan
from linearize.planning.knapsack import Choice
from linearize.planning.survey import Survey
from linearize.running.copies import duplicate
from linearize.sites.record import Record, record_of, set_record
from linearize.surgery.form_choice import make_plan


def site_choices(choice: Choice) -> dict[str, SiteChoice]:
    """What happens to each site, by name, where anything does."""
    each = [c for option in choice.options for c in option.choices]
    return {c.site: c for c in each if c.form != "unchanged"}


def edited(found: Survey, choices: Mapping[str, SiteChoice], keep: Mapping[str, Tensor] | None = None) -> nn.Module:
    """A copy of the gated model with the choices carried out; `keep` overrides which channels stay."""
    model = duplicate(found.gated, CollapseError)
    named = gates(model)
    for name, choice in choices.items():
        if choice.form == "line":
            order = found.unit_costs[name].argsort(stable=True)
            mask = torch.zeros(named[name].channels, dtype=torch.bool)
            mask[order[: named[name].channels - choice.keep]] = True
            named[name].linearize_(mask)
        elif choice.form == WHOLE:
            continue
        elif choice.block:
            if name in found.blocks:
                block = found.blocks[name]
                replace_block(model, block, choice.rank, block.fit(choice.rank, bordered=choice.form == BORDERED))
        elif choice.keep < named[name].channels and name in found.curves:
            carry_out(model, found.curves[name].edit(found.gated, choice, None if keep is None else keep.get(name)))
    wholes = [whole for path, whole in found.wholes.items() if path in choices and choices[path].rank]
    replace_wholes(model, [(whole, fit) for whole in wholes if (fit := whole.fit()) is not None])
    return model


def collapsed(gated: nn.Module, plan: Plan) -> nn.Module:
    """The model in its planned state, collapsed as planned, in eval mode; sites whose block was replaced are done."""
    named = gates(gated)
    if not named:
        small = duplicate(gated, CollapseError).eval()
        record = record_of(gated) or Record()
        set_record(small, Record((), record.steps, record.inputs))
        return small
    return collapse(gated, plan=Plan(tuple(site for site in plan.sites if site.site in named))).eval()


def planned(gated: nn.Module, choices: Mapping[str, SiteChoice], choice: Choice | None = None) -> Plan:
    """The plan of collapsing a model in its planned state, in the forms chosen."""
    losses: dict[str, float] = {}
    for option in choice.options if choice is not None else ():
        for c in option.choices:
            losses[c.site] = option.loss / len(option.choices)
    named = gates(gated)
    blocks = (c for c in choices.values() if c.block)
    sites = [SitePlan(c.site, c.form, (), rank=c.rank, loss=losses.get(c.site, 0.0)) for c in blocks]
    for site in make_plan(gated).sites if named else ():
        chosen = choices.get(site.site)
        if chosen is not None and chosen.form in ("factored", "merged", "vanished") and site.linear and not site.reason:
            gate = named[site.site]
            nothing = (gate.slope == 0) & ((gate.intercept == 0) if gate.gated_unit else True)
            dropped = tuple(i for i in site.linear if bool(nothing[i]))
            site = replace(site, form=chosen.form, dropped=dropped, rank=chosen.rank)  # noqa: PLW2901
        sites.append(replace(site, loss=losses.get(site.site, 0.0)))
    record = record_of(gated) or Record()
    order = {site.name: position for position, site in enumerate(record.sites)}
    return Plan(tuple(sorted(sites, key=lambda site: order.get(site.site, len(order)))))
