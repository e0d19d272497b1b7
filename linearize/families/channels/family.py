"""The family "channels": channels are removed and the next layer is refitted, with or without a linear skip."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from linearize.collapse import collapse_telling
from linearize.errors import CollapseError, UsageError
from linearize.families.channels.apply import Edit, write_edit
from linearize.families.channels.collect import SiteCollector, site_collectors
from linearize.families.channels.fit import Curve, curve_of
from linearize.families.channels.layers import layers_of
from linearize.families.channels.moving import movable
from linearize.families.channels.observation import Observation
from linearize.families.channels.options import group_options
from linearize.families.channels.together import present_layers, with_layers
from linearize.families.family import Assembled, Context, Family, Layers, Movable, Replayed
from linearize.families.option import Group, Option, SiteChoice
from linearize.gating.gate import ChannelGate, gates
from linearize.plan import MASKED, Form, SitePlan
from linearize.running.copies import duplicate
from linearize.running.passes import Collector
from linearize.surgery.form_choice import make_plan, mask_of
from linearize.surgery.layers import MaskedActivation

__all__ = ["ChannelPlaces", "Channels"]

_log = logging.getLogger(__name__)
_REMEMBERED = 1e9  # bytes of edits
_FITTED = ("factored", "merged", "vanished")  # forms whose dropped channels and ranks a plan tells


@dataclass
class ChannelPlaces:
    """Sites whose consumers can be refitted.

    Attributes:
        collectors: one for each.
        barred: why others have none, by name.
        curves: by site name, once the data has been seen.
    """

    collectors: list[SiteCollector]
    barred: dict[str, str] = field(default_factory=dict)
    curves: dict[str, Curve] = field(default_factory=dict)
    _edits: dict[SiteChoice, Edit] = field(default_factory=dict)

    def edit(self, model: nn.Module, choice: SiteChoice, keep: Tensor | None) -> Edit:
        """The closed form of a choice for the surveyed model. It is stored, because trials use it again."""
        curve = self.curves[choice.site]
        if keep is not None:
            return curve.edit(model, choice, keep)
        if choice not in self._edits:
            made = curve.edit(model, choice)
            while self._edits and made.memory + sum(edit.memory for edit in self._edits.values()) > _REMEMBERED:
                del self._edits[next(iter(self._edits))]
            self._edits[choice] = made
        return self._edits[choice]


class Channels(Family):
    """The first family. Its groups hold the sites that all other families build on."""

    name = "channels"
    forms: tuple[Form, ...] = ()
    in_order = True

    def find(self, context: Context) -> ChannelPlaces:
        """Find all sites that can be refitted and can have another width in the code around them."""
        if not context.takes(self.name):
            return ChannelPlaces([], dict.fromkeys(gates(context.gated), "families= leaves channels out"))
        barred = _uncollapsible(context.gated)
        names = [name for name in gates(context.gated) if name not in barred]
        skips = not (context.lean and context.stock)  # options without a skip read nothing but the channels
        return ChannelPlaces(site_collectors(context.gated, names, skips=skips), barred)

    def collectors(self, context: Context, places: ChannelPlaces) -> Sequence[Collector]:
        """Covariances and sensitivities of the sites."""
        return places.collectors

    def options(self, context: Context, places: ChannelPlaces, groups: Sequence[Group]) -> list[Group]:
        """The groups of all sites."""
        seen = [collector.found for collector in places.collectors if collector.found.rows.count]
        context.warned += [note for found in seen if (note := _too_few(found))]
        stock, lean = context.stock, context.lean
        places.curves = {found.site.name: curve_of(context.gated, found, stock=stock, last=lean) for found in seen}
        made = group_options(
            context.gated,
            places.curves,
            round_to=context.round_to,
            barred=places.barred,
            progress=context.progress,
        )
        return [*groups, *made]

    def layers(self, model: nn.Module, places: ChannelPlaces, group: Group, option: Option) -> Layers:
        """The maps and activations that would remain."""
        return layers_of(model, group, option)

    def together(
        self, model: nn.Module, places: ChannelPlaces, group: Group, layers: Layers | None
    ) -> Assembled | None:
        """The maps and activations of all sites of the group, one after the other."""
        named = gates(model)
        if not all(name in named for name in group.sites):
            return None
        chain = [named[name] for name in group.sites]
        return present_layers(model, chain) if layers is None else Assembled(with_layers(chain, layers.modules))

    def apply(
        self,
        model: nn.Module,
        context: Context,
        places: ChannelPlaces,
        choices: Mapping[str, SiteChoice],
        keep: Mapping[str, Tensor],
    ) -> None:
        """Write the refitted weights, and make removed channels linear."""
        named = gates(model)
        for name, choice in choices.items():
            if name in places.curves and choice.keep < named[name].channels:
                write_edit(model, places.edit(context.gated, choice, keep.get(name)))

    def refit(
        self, model: nn.Module, places: ChannelPlaces, choice: SiteChoice, see: Callable[[Sequence[Collector]], None]
    ) -> None:
        """Refit one site on its present inputs. The channels that stay are already decided."""
        curve = places.curves.get(choice.site)
        if curve is None or choice.keep >= curve.channels:
            return
        collectors = site_collectors(model, [choice.site])
        see(collectors)
        again = curve_of(model, collectors[0].found, stock=curve.stock)
        write_edit(model, again.edit(model, choice, curve.keep(choice)))

    def movable(
        self,
        model: nn.Module,
        context: Context,
        places: ChannelPlaces,
        group: Group,
        choices: Mapping[str, SiteChoice],
    ) -> Movable | None:
        """Channels that go to zero, and the others make up for them; or to their line, where one map shall remain."""
        return movable(
            model, context, places.curves, lambda choice: places.edit(context.gated, choice, None), group, choices
        )

    def entry(self, site: SitePlan, choice: SiteChoice, gate: ChannelGate) -> SitePlan:
        """Write the chosen form, the dropped channels, and the rank of the skip into the plan."""
        if choice.form not in _FITTED or not site.linear or site.reason:
            return site
        nothing = (gate.slope == 0) & ((gate.intercept == 0) if gate.gated_unit else True)
        dropped = tuple(i for i in site.linear if bool(nothing[i]))
        return replace(site, form=choice.form, dropped=dropped, rank=choice.rank)

    def replay(self, places: ChannelPlaces, site: SitePlan, gate: ChannelGate | None) -> Replayed | None:
        """Read the kept channels from a plan. They are refitted on the present data."""
        curve = places.curves.get(site.site)
        if curve is not None and site.rank > max(1, curve.largest_rank):
            found = f"found rank {site.rank}, and the largest is {curve.largest_rank}"
            raise UsageError(site.site, found, "Make the plan from this model.")
        if gate is None or curve is None or not site.linear or site.form == MASKED or not (site.dropped or site.rank):
            return None
        mask = mask_of(site, gate.channels)
        choice = SiteChoice(site.site, int((~mask).sum()), site.rank, site.form)
        return Replayed(choice, (~mask).nonzero().flatten())


def _uncollapsible(gated: nn.Module) -> dict[str, str]:
    """Sites whose width cannot change, by name, with the reason: found by trying, on a copy."""
    trial = duplicate(gated, CollapseError)
    for gate in gates(trial).values():
        if gate.site is not None and gate.site.reason is None:
            gate.slope.zero_()
            gate.intercept.zero_()
            gate.linearize_(torch.arange(gate.channels) >= max(1, gate.channels // 2))
    named = {
        name: path for path, module in trial.named_modules() for name, gate in gates(trial).items() if gate is module
    }
    try:
        small = collapse_telling(trial, "cheaper", None, _log.debug)
    except CollapseError as error:
        _log.debug("no trial: %s", error)
        return {}
    modules = dict(small.named_modules())
    stuck = [name for name, path in named.items() if isinstance(modules.get(path), MaskedActivation)]
    plan = make_plan(trial)
    return {name: plan[name].reason or "the code around it does not take another width" for name in stuck}


def _too_few(found: Observation) -> str | None:
    """A covariance of F features needs more than F rows to have full rank."""
    rows: Any = found.rows
    features = len(rows.mean)
    if rows.count > features:
        return None
    needed = -(-(features + 1) * max(1, found.seen) // max(1, rows.count))
    return (
        f"{found.site.name}: found {rows.count} rows for {features} features: the covariance has no full rank and is "
        f"regularised. Pass at least {needed} samples (there were {found.seen}), better ten times as many."
    )
