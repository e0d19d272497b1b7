"""Replace modules by linear maps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from linearize.families.modules.fit import WholeFit
from linearize.families.modules.place import Whole
from linearize.gating.gate import ChannelGate
from linearize.sites.record import Record, Step, record_of, set_record
from linearize.surgery.carriers import roles_of
from linearize.surgery.specs import Spec, build, replace_module

__all__ = ["layer_of", "replace_wholes"]


@torch.no_grad()
def layer_of(model: nn.Module, whole: Whole, found: WholeFit) -> nn.Module:
    """The layer that would replace a module of a model, in its dtype and on its device."""
    old = model.get_submodule(whole.path)
    like = next(parameter for parameter in old.parameters() if parameter.is_floating_point())
    layer = build(whole.spec, old).to(like.device, like.dtype)
    values = {"weight": found.weight, "bias": found.bias}  # of which a layer may have only the first
    for role, (holder, name) in roles_of(layer).items():
        parameter = holder.get_parameter(name)
        parameter.copy_(values[role].view_as(parameter))
    layer.requires_grad_(_trained(old))
    return layer


def _trained(module: nn.Module) -> bool:
    """Whether anything in a module is trained, its gates apart: adapters may be, beside weights that are not."""
    alphas = {id(gate.alpha) for gate in module.modules() if isinstance(gate, ChannelGate)}
    return any(parameter.requires_grad for parameter in module.parameters() if id(parameter) not in alphas)


def replace_wholes(model: nn.Module, chosen: Sequence[tuple[Whole, WholeFit]]) -> None:
    """Replace modules of a gated model by linear maps. Sites inside have no gates any more.

    Maps of which one does nothing but read the other become one.
    """
    steps: list[Step] = []
    why: dict[str, str] = {}
    for whole, found in _merged(chosen):
        for gate in model.get_submodule(whole.path).modules():
            if isinstance(gate, ChannelGate) and gate.site is not None:
                why[gate.site.name] = f"{whole.path} became one linear map"
        spec: Spec = {"type": "Identity"} if found is None else whole.spec
        layer = build(spec, nn.Identity()) if found is None else layer_of(model, whole, found)
        replace_module(model, whole.path, layer)
        steps.append({"path": whole.path, "module": spec})
    record = record_of(model) or Record()
    sites = tuple(replace(site, ungated=why.get(site.name, site.ungated)) for site in record.sites)
    set_record(model, Record(sites, [*record.steps, *steps], record.inputs))


def _merged(chosen: Sequence[tuple[Whole, WholeFit]]) -> list[tuple[Whole, WholeFit | None]]:
    """The same maps, those that follow each other multiplied where that costs no more; None for what is left over."""
    found: dict[str, tuple[Whole, WholeFit | None]] = {}
    heads: dict[str, str] = {}  # by path of a map, the path of the one that it went into
    for whole, fit in chosen:
        head = heads.get(whole.behind, "")
        first, known = found.get(head, (None, None))
        if first is None or known is None or not (first.alone and whole.alone) or first.axis != whole.axis:
            found[whole.path], heads[whole.path] = (whole, fit), whole.path
            continue
        if whole.outputs * first.inputs > first.outputs * (first.inputs + whole.outputs):
            found[whole.path], heads[whole.path] = (whole, fit), whole.path
            continue
        both = WholeFit(fit.weight @ known.weight, fit.weight @ known.bias + fit.bias, known.loss + fit.loss)
        found[head] = replace(first, outputs=whole.outputs), both
        found[whole.path], heads[whole.path] = (whole, None), head
    return list(found.values())
