"""Replace a block by one convolution."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from linearize.families.blocks.find import Block
from linearize.families.blocks.fit import BlockFit
from linearize.gating.gate import gates
from linearize.sites.record import Record, Step, record_of, set_record
from linearize.surgery.carriers import roles_of
from linearize.surgery.carry_out import unfold
from linearize.surgery.specs import Spec, build, replace_module

__all__ = ["replace_block"]


@torch.no_grad()
def replace_block(model: nn.Module, block: Block, kernel: int, found: BlockFit) -> None:
    """Replace a block of a gated model by one convolution. Its sites have no gates any more."""
    steps: list[Step] = []
    paths = {id(module): path for path, module in model.named_modules()}
    named = gates(model)
    taken = [paths[id(named[site.name])] for site in block.sites]
    for site in block.sites:
        steps += unfold(model, site)
    for path in taken:
        steps.append(_put(model, path, {"type": "Identity"}))
    old: Any = model.get_submodule(block.first.module)
    spec = block.spec(kernel, bordered=found.border is not None)
    steps.append(_put(model, block.first.module, spec))
    layer: Any = model.get_submodule(block.first.module)
    layer.to(old.weight.device, old.weight.dtype)
    values: dict[str, Any] = {"weight": found.weight, "bias": found.bias, "border": found.border}
    for role, (holder, name) in roles_of(layer).items():
        holder.get_parameter(name).copy_(values[role])
    for parameter in layer.parameters():
        parameter.requires_grad_(old.weight.requires_grad)
    steps += [_put(model, path, {"type": "Identity"}) for path in block.maps[1:]]
    record = record_of(model) or Record()
    gone = {site.name for site in block.sites}
    why = "its block became one convolution"
    sites = tuple(replace(site, ungated=why) if site.name in gone else site for site in record.sites)
    set_record(model, Record(sites, [*record.steps, *steps], record.inputs))


def _put(model: nn.Module, path: str, spec: Spec) -> Step:
    replace_module(model, path, build(spec, model.get_submodule(path)))
    return {"path": path, "module": spec}
