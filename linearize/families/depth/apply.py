"""Take layers away: a map merged into the projection before them, and a layer that does nothing in their place."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from linearize.families.depth.fit import DepthMap
from linearize.families.depth.place import LayerChain
from linearize.gating.gate import ChannelGate
from linearize.sites.record import Record, Step, record_of, set_record
from linearize.sites.site import Port
from linearize.surgery.skipped import Skipped
from linearize.surgery.specs import build, replace_module
from linearize.zoo.layers import indices_in

__all__ = ["merge_map", "merged_projection", "skip_layers", "spec_for"]


def spec_for(model: nn.Module, chain: LayerChain, index: int) -> dict[str, object]:
    """The layer that does nothing, in the place of one."""
    layer = chain.layers[index]
    indices = list(indices_in(model, layer.path))
    return {
        "type": "Skipped", "keyword": layer.keyword, "nones": layer.nones, "rows": layer.rows, "indices": indices
    }  # fmt: skip


def skip_layers(model: nn.Module, chain: LayerChain, gone: Sequence[int]) -> None:
    """Put layers that do nothing in the place of some; sites inside have no gates any more."""
    why: dict[str, str] = {}
    steps: list[Step] = []
    for index in gone:
        path = chain.layers[index].path
        current = model.get_submodule(path)
        if isinstance(current, Skipped):
            continue
        for gate in current.modules():
            if isinstance(gate, ChannelGate) and gate.site is not None:
                why[gate.site.name] = f"{path} is gone"
        spec = spec_for(model, chain, index)
        replace_module(model, path, build(spec, current))
        steps.append({"path": path, "module": spec})
    record = record_of(model) or Record()
    sites = tuple(replace(site, ungated=why.get(site.name, site.ungated)) for site in record.sites)
    set_record(model, Record(sites, [*record.steps, *steps], record.inputs))


@torch.no_grad()
def merged_projection(module: nn.Module, port: Port, found: DepthMap) -> nn.Module:
    """A copy of a projection that computes `(I + T) (W h + b) + shift`; a layer without a bias gets none."""
    made: Any = copy.deepcopy(module)
    weight = made.weight.detach().double()
    weight = weight.t() if port.transposed else weight
    full = found.map.to(weight) + torch.eye(len(weight), dtype=weight.dtype, device=weight.device)
    value = full @ weight
    made.weight.copy_(value.t() if port.transposed else value)
    if made._parameters.get("bias") is not None:
        made.bias.copy_(full @ made.bias.detach().double() + found.shift.to(full))
    return made  # type: ignore[no-any-return]


@torch.no_grad()
def merge_map(model: nn.Module, chain: LayerChain, index: int, found: DepthMap) -> bool:
    """Write `(I + T) W` for the projection of a layer; False if it is not there any more."""
    port = chain.layers[index].out
    modules: dict[str, Any] = dict(model.named_modules())
    old = None if port is None else modules.get(port.module)
    if port is None or old is None or old._parameters.get("weight") is None:
        return False
    if old.weight.shape[1 if port.transposed else 0] != len(found.map):
        return False
    made: Any = merged_projection(old, port, found)
    old.weight.copy_(made.weight)
    if old._parameters.get("bias") is not None:
        old.bias.copy_(made.bias)
    return True
