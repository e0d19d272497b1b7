"""The layers that remain at a site after channels were removed, to measure their time."""

from __future__ import annotations

import copy
import json
from typing import Any

from torch import nn

from linearize.algebra.piece import Piece
from linearize.families.family import Layers
from linearize.families.option import Group, Option
from linearize.families.price import Pricer
from linearize.gating.gate import ChannelGate, gates
from linearize.gating.groups import ports_of
from linearize.surgery.layers import PartialActivation
from linearize.surgery.make import layer_spec
from linearize.surgery.specs import build

__all__ = ["layers_of", "released"]


def released(gate: ChannelGate) -> nn.Module:
    """The activation as it will be in the collapsed model. The gate does not change."""
    return copy.deepcopy(gate).released()


def layers_of(model: nn.Module, group: Group, option: Option) -> Layers:
    """Maps and activations of an option with random weights."""
    named = gates(model)
    chain = [named[name] for name in group.sites]
    price = Pricer(model, chain).after(option.choices)
    dims = {port.module: port.dims for gate in chain if gate.site is not None for port in ports_of(gate.site)}
    like = next(p for p in model.parameters() if p.is_floating_point())
    layers: dict[str, nn.Module] = {}
    texts = []
    for path, piece in price.pieces.items():
        spec = _spec(piece, dims[path], model.get_submodule(path))
        layers[path] = build(spec, model.get_submodule(path)).to(like.device, like.dtype).eval()
        texts.append(json.dumps(spec, sort_keys=True))
    for gate, choice in zip(chain, option.choices, strict=True):
        if gate.site is not None:
            inner: nn.Module = nn.Identity()
            if choice.keep:
                inner = released(gate)
                if choice.rank:
                    inner = PartialActivation(
                        gate.activation, choice.keep, gate.axis, gate.in_place and gate.site.direct
                    )
            layers[f"{gate.site.name} activation"] = inner
            texts.append(f"{choice.keep} {choice.rank} {choice.form}")
    return Layers(layers, "; ".join(texts))


def _spec(piece: Piece, dims: int, old: nn.Module) -> dict[str, Any]:
    if piece.layer == "identity" or piece.affine is None:
        return {"type": "Ones", "width": piece.number} if piece.layer == "all_ones" else {"type": "Identity"}
    return layer_spec(piece, piece.affine, dims, bias=getattr(old, "bias", None) is not None)
