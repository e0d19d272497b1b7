"""The convolution that would replace a block, to measure its time."""

from __future__ import annotations

import json

from torch import nn

from linearize.families.blocks.find import Block
from linearize.families.blocks.options import BORDERED
from linearize.families.family import Layers
from linearize.families.option import SiteChoice
from linearize.surgery.specs import build

__all__ = ["layers_of"]


def layers_of(model: nn.Module, block: Block, choice: SiteChoice) -> Layers:
    """The layers of the option: one convolution, and nothing after it."""
    like = next(p for p in model.parameters() if p.is_floating_point())
    spec = block.spec(choice.rank, bordered=choice.form == BORDERED)
    layers: dict[str, nn.Module] = {path: nn.Identity() for path in block.maps}
    layers[block.first.module] = build(spec, nn.Identity()).to(like.device, like.dtype).eval()
    layers |= {f"{site.name} activation": nn.Identity() for site in block.sites}
    return Layers(layers, json.dumps(spec, sort_keys=True))
