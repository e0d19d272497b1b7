"""Experts of a mixture go, or become narrower; which numbers say so is found by trying."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from linearize.errors import UsageError
from linearize.families.enclosing import enclosed, homes_of
from linearize.families.experts.apply import record_steps, slice_channels, slice_experts, write_down
from linearize.families.experts.collect import ExpertsCollector
from linearize.families.experts.find import mixtures_of, told
from linearize.families.experts.fit import ExpertCurve, curve_of
from linearize.families.experts.options import EXPERTS, NARROWER, common_options, experts_groups, split
from linearize.families.experts.place import Experts
from linearize.families.experts.remarks import remarks
from linearize.families.family import REMAKE, Context, Family, Layers, Replayed
from linearize.families.option import Group, Option, SiteChoice
from linearize.gating.gate import ChannelGate
from linearize.gating.groups import groups_of
from linearize.plan import Form, SitePlan
from linearize.running.models import device_of
from linearize.running.passes import Collector

__all__ = ["ExpertPlaces", "MixturesOfExperts"]


@dataclass
class ExpertPlaces:
    """Mixtures of which experts may go, by the path of what holds them.

    Attributes:
        found: observed once the data has been seen.
        equal: whether all must keep equally many.
        curves: of those whose channels are known.
    """

    found: Mapping[str, Experts] = field(default_factory=dict)
    equal: bool = False
    curves: dict[str, ExpertCurve] = field(default_factory=dict)


def _fewer(keep: int, rank: int) -> str:
    return f"keep {keep} experts"


def _narrower(keep: int, rank: int) -> str:
    return f"keep {keep} channels of all experts"


class MixturesOfExperts(Family):
    """Places are mixtures, by the path of what holds their experts."""

    name = "experts"
    forms: tuple[Form, ...] = (Form(EXPERTS, _fewer), Form(NARROWER, _narrower))

    def find(self, context: Context) -> ExpertPlaces:
        """Mixtures whose experts can be told apart, and whose code takes fewer."""
        if context.measure == "activations":
            return ExpertPlaces()
        found = mixtures_of(context.gated, context.batch)
        narrow = {place.bank: f"as wide as they are: {place.narrow}" for place in found.places if place.narrow}
        context.told += told(found.reasons | narrow)
        equal = found.equal or context.stock or context.uniform
        return ExpertPlaces({place.name: place for place in found.places}, equal)

    def collectors(self, context: Context, places: ExpertPlaces) -> Sequence[Collector]:
        """Who is picked, what changes without each, and what the channels are."""
        device = device_of(context.gated)
        return [ExpertsCollector(place, device) for place in places.found.values()]

    def options(self, context: Context, places: ExpertPlaces, groups: Sequence[Group]) -> list[Group]:
        """A group for each mixture; one for all, if they must agree."""
        seen = [place for place in places.found.values() if place.sums is not None and place.sums.looked]
        places.curves = {p.name: curve for p in seen if (curve := curve_of(context.gated, p)) is not None}
        context.told += remarks(seen)
        made = experts_groups(
            context.gated, seen, places.curves, context.some, round_to=context.round_to, progress=context.progress
        )
        if places.equal and len(made) > 1:
            listed = [place.bank for place in seen if place.listed]
            if listed:
                context.told += told(dict.fromkeys(listed, "lists of experts are not shortened to equal lengths"))
            made = [] if listed else [common_options(made, places.found)]
        homes = homes_of(context.gated, groups_of(context.gated))
        whole = list(groups)
        for group in made:
            place = places.found[group.sites[0]]
            if place.listed:  # it holds the places of other families, which go with their experts
                whole = enclosed(whole, replace(group, gone_form=EXPERTS, encloses=True, touches=()), homes)
            else:
                whole.append(group)
        return whole

    def layers(self, model: nn.Module, places: ExpertPlaces, group: Group, option: Option) -> Layers:
        """Experts cannot be timed alone, since only the router knows who picks which: for a mixture this raises."""
        if group.encloses:  # FLOPs tell what they take
            return Layers({group.sites[0]: nn.Identity()}, "experts")
        raise ValueError(f"{group.sites[0]}: experts are not timed by themselves")

    def apply(
        self,
        model: nn.Module,
        context: Context,
        places: ExpertPlaces,
        choices: Mapping[str, SiteChoice],
        keep: Mapping[str, Tensor],
    ) -> None:
        """Refit the last matrices of experts, and slice."""
        for name, choice in choices.items():
            place = places.found.get(name)
            if place is None or not choice.gone:
                continue  # inside an expert of a list: it is gone with it, or plain again
            gone, channels = choice.gone, dict[int, tuple[int, ...]]()
            if choice.form == NARROWER:
                parts = split(place, choice.gone)
                gone, channels = ((), {}) if parts is None else parts
                _refit(model, place, places.curves[name], channels)
            steps = slice_experts(model, place, gone) if gone else []
            if channels:
                steps += slice_channels(model, place, torch.tensor([channels[e] for e in sorted(channels)]))
            record_steps(model, place, steps)

    def replay(self, places: ExpertPlaces, site: SitePlan, gate: ChannelGate | None) -> Replayed | None:
        """What the plan keeps of a mixture, refitted on the data at hand."""
        place = places.found.get(site.site)
        gone = tuple(site.dropped)
        if place is None:
            inside = any(p.listed and site.site.startswith(f"{p.bank}.") for p in places.found.values())
            return Replayed(SiteChoice(site.site, 0, form=EXPERTS)) if inside else None
        units = place.count
        if site.form == NARROWER:
            parts = split(place, gone)
            units = place.count * (0 if place.channels is None else place.channels.width)
            lost = None if parts is None else len(parts[0])
        else:
            lost = len(gone)
        if (
            site.channels != units
            or not gone
            or lost is None
            or place.count - lost < (place.count if place.fixed else place.least)
        ):
            found = (
                f"found {len(gone)} of {site.channels} gone; it has {units}, of which {place.least} experts must stay"
            )
            raise UsageError(site.site, found, REMAKE)
        return Replayed(SiteChoice(site.site, units - len(gone), form=site.form, gone=gone))


def _refit(model: nn.Module, place: Experts, curve: ExpertCurve, channels: Mapping[int, tuple[int, ...]]) -> None:
    """Write the refitted matrices, where the channels that stay are now; the others are sliced away afterwards."""
    for expert, keep in channels.items():
        found = curve.refitted(expert, keep)
        weight = curve.weights[expert].clone()
        weight[:, list(keep)] = found.weight.to(weight)
        write_down(model, place, expert, weight, None if curve.biases is None else found.bias)
