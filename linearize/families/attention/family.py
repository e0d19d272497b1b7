"""Attention becomes one linear map, or nothing, and its keys and values go from the cache."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor, nn

from linearize.families.attention.collect import AttentionCollector
from linearize.families.attention.find import attention_wholes
from linearize.families.attention.options import ATTENTION, silence, with_attentions
from linearize.families.enclosing import homes_of
from linearize.families.family import Context, Family, Layers, Replayed
from linearize.families.modules.apply import layer_of
from linearize.families.modules.fit import WholeFit, fit_whole
from linearize.families.modules.place import Whole
from linearize.families.option import Group, Option, SiteChoice
from linearize.families.reading import read
from linearize.gating.gate import ChannelGate
from linearize.gating.groups import groups_of
from linearize.plan import Form, SitePlan
from linearize.running.models import device_of
from linearize.running.passes import Collector
from linearize.sites.record import Record, Step, record_of, set_record
from linearize.surgery.specs import build, replace_module
from linearize.zoo.caches import generates
from linearize.zoo.layers import indices_in, renumbered

__all__ = ["AttentionPlaces", "Attentions"]


@dataclass
class AttentionPlaces:
    """Attentions that may go, by path, the maps that would stand for them, and the paths of all there are."""

    wholes: Mapping[str, Whole] = field(default_factory=dict)
    fits: dict[str, WholeFit] = field(default_factory=dict)
    owners: Sequence[str] = ()


def _told(keep: int, rank: int) -> str:
    return f"attention as one linear map of rank {rank}" if rank else "attention left out"


class Attentions(Family):
    """Places are attentions, by path. Heads inside go with them."""

    name = "attention"
    forms: tuple[Form, ...] = (Form(ATTENTION, _told),)

    def find(self, context: Context) -> AttentionPlaces:
        """Attentions that make one tensor of one, whatever caches they are told."""
        if not context.modules or context.tied or context.measure == "activations":
            return AttentionPlaces()
        wholes, reasons = attention_wholes(context.gated, context.batch, context.memory)
        grouped: dict[str, list[str]] = {}
        for path, why in reasons.items():
            grouped.setdefault(why, []).append(path)
        for why, paths in grouped.items():
            more = f" (and {len(paths) - 1} more)" if len(paths) > 1 else ""
            context.told.append(f"attention stays in {paths[0]}{more}: {why}")
        owners = [one.owner for one in read(context.gated, context.batch, context.memory).attentions]
        return AttentionPlaces({whole.path: whole for whole in wholes}, owners=owners)

    def collectors(self, context: Context, places: AttentionPlaces) -> Sequence[Collector]:
        """Covariances of input and output."""
        device = device_of(context.gated)
        return [AttentionCollector(whole, device) for whole in places.wholes.values()]

    def options(self, context: Context, places: AttentionPlaces, groups: Sequence[Group]) -> list[Group]:
        """A group for each attention; where whole modules are replaced anyway, its map is among those already."""
        for path, whole in places.wholes.items():
            found = fit_whole(whole)
            if found is not None:
                places.fits[path] = found
        maps = any(generates(module) for module in context.gated.modules()) or not context.takes("modules")
        homes = homes_of(context.gated, groups_of(context.gated))
        wholes = list(places.wholes.values())
        return with_attentions(
            groups, wholes, places.fits, context.gated, context.some, homes, maps=maps, progress=context.progress
        )

    def layers(self, model: nn.Module, places: AttentionPlaces, group: Group, option: Option) -> Layers:
        """The linear map, or what gives zeros."""
        whole, choice = places.wholes[group.sites[0]], option.choices[0]
        old = model.get_submodule(whole.path)
        spec = whole.spec if choice.rank else silence(whole)
        like = next(parameter for parameter in old.parameters() if parameter.is_floating_point())
        return Layers({whole.path: build(spec, old).to(like.device, like.dtype)}, str(spec), whole.keyword)

    def apply(
        self,
        model: nn.Module,
        context: Context,
        places: AttentionPlaces,
        choices: Mapping[str, SiteChoice],
        keep: Mapping[str, Tensor],
    ) -> None:
        """Replace the chosen attentions, and renumber the entries of the cache behind them."""
        steps: list[Step] = []
        lost: list[int] = []
        why: dict[str, str] = {}
        for path, whole in places.wholes.items():
            choice = choices.get(path)
            if choice is None or not (choice.rank or choice.gone):
                continue
            old = model.get_submodule(path)
            for gate in old.modules():
                if isinstance(gate, ChannelGate) and gate.site is not None:
                    why[gate.site.name] = f"{path} is gone"
            lost += indices_in(model, path) if whole.caches else ()
            spec = whole.spec if choice.rank else silence(whole)
            layer = layer_of(model, whole, places.fits[path]) if choice.rank else build(spec, old)
            replace_module(model, path, layer)
            steps.append({"path": path, "module": spec})
        steps += renumbered(model, lost, within=places.owners)
        record = record_of(model) or Record()
        sites = tuple(replace(site, ungated=why.get(site.name, site.ungated)) for site in record.sites)
        set_record(model, Record(sites, [*record.steps, *steps], record.inputs))

    def replay(self, places: AttentionPlaces, site: SitePlan, gate: ChannelGate | None) -> Replayed | None:
        """The map again, fitted on the data at hand, or nothing; of what is inside, that it goes."""
        inside = any(site.site.startswith(f"{path}.") for path in places.wholes)
        if site.site not in places.wholes and not inside and gate is None:
            return None
        return Replayed(SiteChoice(site.site, 0, site.rank, ATTENTION, tuple(site.dropped)))
