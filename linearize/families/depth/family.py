"""Layers go, and the model becomes a stock one with fewer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from linearize.families.depth.apply import merge_map, skip_layers, spec_for
from linearize.families.depth.collect import DepthCollector
from linearize.families.depth.find import chains_of
from linearize.families.depth.options import DEPTH, Runs, with_layers
from linearize.families.depth.place import LayerChain
from linearize.families.enclosing import homes_of
from linearize.families.family import Context, Family, Layers, Replayed
from linearize.families.option import Group, Option, SiteChoice
from linearize.gating.gate import ChannelGate
from linearize.gating.groups import groups_of
from linearize.plan import Form, SitePlan
from linearize.running.models import device_of
from linearize.running.passes import Collector
from linearize.surgery.specs import build

__all__ = ["Depth", "DepthPlaces"]

_MEMORY = 1e9  # bytes of sums: they bound how far a map looks ahead


def _told(keep: int, rank: int) -> str:
    return "gone with its layer"


@dataclass
class DepthPlaces:
    """Chains of layers, and what stands for runs of them once the data has been seen."""

    chains: Sequence[LayerChain] = ()
    runs: list[Runs] = field(default_factory=list)

    def layer(self, path: str) -> tuple[LayerChain, int] | None:
        """The chain and the index of a layer."""
        for chain in self.chains:
            for index, layer in enumerate(chain.layers):
                if layer.path == path:
                    return chain, index
        return None


class Depth(Family):
    """Places are layers, by path; sites inside go with them."""

    name = "depth"
    forms: tuple[Form, ...] = (Form(DEPTH, _told),)

    def find(self, context: Context) -> DepthPlaces:
        """Lists of layers that read one another, and that may be shorter."""
        if context.tied or context.measure == "activations":
            return DepthPlaces()
        homes = homes_of(context.gated, groups_of(context.gated))
        chains = chains_of(context.gated, context.batch, homes, context.memory)
        context.told += _reasons(chains)
        return DepthPlaces(chains)

    def collectors(self, context: Context, places: DepthPlaces) -> Sequence[Collector]:
        """Sums between branches and what the layers behind add, for as many layers ahead as memory holds."""
        device = device_of(context.gated)
        found = []
        for chain in places.chains:
            free = set(chain.free)
            size = 8.0 * chain.layers[0].shape[-1] ** 2 * max(1, len(chain.layers))
            most = max(1, int(_MEMORY / size) - 1)
            for index, layer in enumerate(chain.layers):
                ahead = 0
                while ahead < most and index + ahead + 1 in free:
                    ahead += 1
                if layer.out is not None and ahead:
                    found.append(DepthCollector(chain, index, ahead, device))
        return found

    def options(self, context: Context, places: DepthPlaces, groups: Sequence[Group]) -> list[Group]:
        """A group for each layer that may go."""
        places.runs = [Runs(context.gated, chain) for chain in places.chains if chain.free]
        homes = homes_of(context.gated, groups_of(context.gated))
        return with_layers(groups, places.runs, homes, context.some, progress=context.progress)

    def layers(self, model: nn.Module, places: DepthPlaces, group: Group, option: Option) -> Layers:
        """The layer that returns its input unchanged."""
        found = places.layer(group.sites[0])
        if found is None:
            raise ValueError(f"{group.sites[0]} is no layer of a chain")
        chain, index = found
        made = build(spec_for(model, chain, index), model.get_submodule(group.sites[0]))
        return Layers({group.sites[0]: made}, "nothing", chain.layers[index].keyword)

    def apply(
        self,
        model: nn.Module,
        context: Context,
        places: DepthPlaces,
        choices: Mapping[str, SiteChoice],
        keep: Mapping[str, Tensor],
    ) -> None:
        """Merge maps into the projections before runs of layers, and let the layers do nothing."""
        for run in places.runs:
            layers = run.chain.layers
            gone = [i for i, layer in enumerate(layers) if layer.path in choices and choices[layer.path].gone]
            for index, found in run.maps(gone).items():
                merge_map(model, run.chain, index, found)
            skip_layers(model, run.chain, gone)

    def replay(self, places: DepthPlaces, site: SitePlan, gate: ChannelGate | None) -> Replayed | None:
        """A layer that goes, with the map fitted on the data at hand; of what is inside, that it goes with it."""
        if site.dropped and places.layer(site.site) is not None:
            return Replayed(SiteChoice(site.site, 0, form=DEPTH, gone=(0,)))
        inside = any(site.site.startswith(f"{layer.path}.") for chain in places.chains for layer in chain.layers)
        return Replayed(SiteChoice(site.site, 0, form=DEPTH)) if inside or gate is not None else None


def _reasons(chains: Sequence[LayerChain]) -> list[str]:
    """Why layers stay, and which lists take no map, each once."""
    told: dict[str, list[str]] = {}
    for chain in chains:
        for layer in chain.layers:
            if layer.reason is not None:
                told.setdefault(f"stays: {layer.reason}", []).append(layer.path)
        if chain.free and not any(layer.out is not None for layer in chain.layers):
            why = "takes no map for layers that go: what its layers give is no plain sum with a projection"
            told.setdefault(why, []).append(chain.layers[0].path.rpartition(".")[0])
    more = {why: f" (and {len(paths) - 1} more)" if len(paths) > 1 else "" for why, paths in told.items()}
    return [f"{paths[0]}{more[why]} {why}" for why, paths in told.items()]
