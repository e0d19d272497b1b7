"""The family "blocks": one dense convolution replaces a chain of sites between two linear maps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

from torch import Tensor, nn

from linearize.errors import UsageError
from linearize.families.blocks.apply import replace_block
from linearize.families.blocks.collect import BlockCollector
from linearize.families.blocks.find import Block, blocks_of
from linearize.families.blocks.fit import fit_block
from linearize.families.blocks.layers import layers_of
from linearize.families.blocks.options import BLOCKS, BORDERED, with_block
from linearize.families.family import Context, Family, Layers, Replayed
from linearize.families.option import Group, Option, SiteChoice
from linearize.gating.gate import ChannelGate
from linearize.gating.groups import groups_of
from linearize.plan import Form, SitePlan
from linearize.running.models import device_of
from linearize.running.passes import Collector

__all__ = ["Blocks"]


def _told(keep: int, rank: int, *, border: bool) -> str:
    return f"one {rank}x{rank} convolution{' and a border' if border else ''}"


class Blocks(Family):
    """Its places are blocks, by the name of their first site. The rank of a choice is the size of the kernel."""

    name = "blocks"
    forms: tuple[Form, ...] = tuple(Form(name, partial(_told, border=name == BORDERED)) for name in BLOCKS)

    def find(self, context: Context) -> dict[str, Block]:
        """Find groups of sites that one convolution could replace."""
        if context.stock:
            return {}
        return {block.name: block for block in blocks_of(context.gated, groups_of(context.gated))}

    def collectors(self, context: Context, places: Mapping[str, Block]) -> Sequence[Collector]:
        """Covariances of patches and outputs."""
        device = device_of(context.gated)
        return [BlockCollector(block, device) for block in places.values()]

    def options(self, context: Context, places: Mapping[str, Block], groups: Sequence[Group]) -> list[Group]:
        """The options of each group that is a block: each kernel size, with and without a border."""
        return [with_block(group, places[group.sites[0]]) if group.sites[0] in places else group for group in groups]

    def layers(self, model: nn.Module, places: Mapping[str, Block], group: Group, option: Option) -> Layers:
        """The convolution that would replace the block."""
        return layers_of(model, places[group.sites[0]], option.choices[0])

    def apply(
        self,
        model: nn.Module,
        context: Context,
        places: Mapping[str, Block],
        choices: Mapping[str, SiteChoice],
        keep: Mapping[str, Tensor],
    ) -> None:
        """Replace blocks by their convolutions."""
        for name, choice in choices.items():
            if name in places:
                found = fit_block(places[name], choice.rank, bordered=choice.form == BORDERED)
                replace_block(model, places[name], choice.rank, found)

    def replay(self, places: Mapping[str, Block], site: SitePlan, gate: ChannelGate | None) -> Replayed | None:
        """Read the convolution of a block from a plan. It is fitted again on the present data."""
        if not places:
            return None
        block = next((block for block in places.values() if site.site in {s.name for s in block.sites}), None)
        if block is None or site.rank not in block.rows:
            sizes = sorted(block.rows) if block is not None else []
            found = f"found a {site.form} of kernel {site.rank}, and {sizes or 'none'} can stand here"
            raise UsageError(site.site, found, "Make the plan from this model.")
        return Replayed(SiteChoice(site.site, 0, site.rank, site.form))
