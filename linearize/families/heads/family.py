"""Heads of attention go: query heads, with their group of keys and values where they share one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from linearize.algebra.regression import Fit
from linearize.errors import UsageError
from linearize.families.family import REMAKE, Context, Family, Layers, Replayed
from linearize.families.heads.apply import record_steps, slice_heads, without_heads
from linearize.families.heads.collect import HeadsCollector
from linearize.families.heads.find import heads_of, told
from linearize.families.heads.fit import HeadCurve, curve_of
from linearize.families.heads.options import HEADS, heads_group
from linearize.families.heads.place import Heads
from linearize.families.option import Group, Option, SiteChoice
from linearize.gating.gate import ChannelGate
from linearize.plan import Form, SitePlan
from linearize.running.models import device_of
from linearize.running.passes import Collector
from linearize.tensors import held

__all__ = ["AttentionHeads", "HeadPlaces"]


@dataclass
class HeadPlaces:
    """Attentions of which heads may go, by the path of their projection.

    Attributes:
        found: observed once the data has been seen.
        curves: likewise.
    """

    found: Mapping[str, Heads] = field(default_factory=dict)
    curves: dict[str, HeadCurve] = field(default_factory=dict)
    _fits: dict[tuple[str, tuple[int, ...]], Fit] = field(default_factory=dict)

    def refitted(self, name: str, gone: tuple[int, ...]) -> Fit:
        """The projection without some units; remembered, since trials ask for it again."""
        if (name, gone) not in self._fits:
            self._fits[name, gone] = self.curves[name].refitted(gone)
        return self._fits[name, gone]


def _told(keep: int, rank: int) -> str:
    return f"keep {keep} heads, or groups of them"


class AttentionHeads(Family):
    """Places are attentions, by the path of their output projection."""

    name = "heads"
    forms: tuple[Form, ...] = (Form(HEADS, _told),)

    def find(self, context: Context) -> HeadPlaces:
        """Attentions whose heads can be told apart, and whose code takes fewer."""
        if context.tied or context.measure == "activations":
            return HeadPlaces()
        places, reasons = heads_of(context.gated, context.batch, context.memory)
        context.told += told(reasons)
        return HeadPlaces({place.name: place for place in places})

    def collectors(self, context: Context, places: HeadPlaces) -> Sequence[Collector]:
        """Covariances of heads."""
        device = device_of(context.gated)
        return [HeadsCollector(place, _outputs(context.gated, place), device) for place in places.found.values()]

    def options(self, context: Context, places: HeadPlaces, groups: Sequence[Group]) -> list[Group]:
        """A group for each attention."""
        made = []
        for name, place in places.found.items():
            if place.rows is None or not place.rows.count:
                continue
            places.curves[name] = curve_of(context.gated, place)
            made.append(heads_group(context.gated, places.curves[name]))
        return [*groups, *made]

    def layers(self, model: nn.Module, places: HeadPlaces, group: Group, option: Option) -> Layers:
        """Always raises: an attention cannot run outside its model, which gives it masks and positions."""
        raise ValueError(f"{group.sites[0]}: heads are not timed by themselves")

    def apply(
        self,
        model: nn.Module,
        context: Context,
        places: HeadPlaces,
        choices: Mapping[str, SiteChoice],
        keep: Mapping[str, Tensor],
    ) -> None:
        """Refit the projections, and slice."""
        for name, choice in choices.items():
            place = places.found[name]
            without_heads(model, place, choice.gone, places.refitted(name, choice.gone))
            record_steps(model, slice_heads(model, place, choice.gone))

    def replay(self, places: HeadPlaces, site: SitePlan, gate: ChannelGate | None) -> Replayed | None:
        """The heads that the plan keeps, refitted on the data at hand."""
        place = places.found.get(site.site)
        if place is None:
            return None
        gone = site.dropped
        if site.channels != place.units or not 0 < len(gone) < place.units:
            found = f"found {len(gone)} of {site.channels} units gone; it has {place.units}"
            raise UsageError(site.site, found, REMAKE)
        return Replayed(SiteChoice(site.site, place.units - len(gone), form=HEADS, gone=tuple(gone)))


def _outputs(model: nn.Module, place: Heads) -> int:
    weight = held(model.get_submodule(place.name), "weight")
    return 0 if weight is None else weight.numel() // place.out.total
