"""Take experts away, or channels of each, from all tensors that hold them.

What no token reads any more goes: an expert whose logit is minus infinity, a channel that the last matrix multiplies by
zero. So slicing is exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from linearize.families.experts.layout import axis_of
from linearize.families.experts.place import ExpertChannels, ExpertNumber, Experts
from linearize.gating.gate import ChannelGate
from linearize.sites.record import Record, Step, record_of, set_record
from linearize.surgery.attributes import ATTRIBUTES, set_attributes
from linearize.surgery.skipped import SHORTENED, shorten
from linearize.surgery.smaller import put_smaller
from linearize.surgery.specs import replace_module
from linearize.tensors import held

__all__ = ["named_tensors", "record_steps", "slice_channels", "slice_experts", "write_down", "zero_channels"]


def named_tensors(module: nn.Module, names: Sequence[str]) -> dict[str, Tensor]:
    """Tensors of a module by name.

    Raises:
        ValueError: it has no such tensor.
    """
    found = {name: held(module, name) for name in names}
    lost = [name for name, value in found.items() if value is None]
    if lost:
        raise ValueError(f"{type(module).__name__} has no tensor {lost[0]!r}")
    return {name: value.detach() for name, value in found.items() if value is not None}


@torch.no_grad()
def slice_experts(model: nn.Module, place: Experts, gone: Sequence[int]) -> list[Step]:
    """Take experts out of a model, in place: rows of the router, slices or modules, and the numbers that count them."""
    keep = place.kept(gone)
    steps: list[Step] = []
    for path, names in place.rows.items():
        module = model.get_submodule(path)
        tensors = named_tensors(module, names)
        index = torch.tensor(keep, device=next(iter(tensors.values())).device)
        axes = {name: axis_of(value, place.count) or 0 for name, value in tensors.items()}
        spec = put_smaller(module, {name: value.index_select(axes[name], index) for name, value in tensors.items()})
        steps.append({"path": path, "module": spec})
    if place.listed:
        steps += _shortened(model, place.bank, keep)
    return [*steps, *_told(model, place, "experts", len(keep))]


@torch.no_grad()
def slice_channels(model: nn.Module, place: Experts, keep: Tensor) -> list[Step]:
    """Leave only some channels of each expert, (E, m), in place. They are those of the experts that are there."""
    channels = _known(place)
    bank = model.get_submodule(place.bank)
    made: dict[str, Tensor] = {}
    for name, value in named_tensors(bank, list(channels.slots)).items():
        slots = channels.slots[name]
        entries = slots.entries(keep.to(value.device), channels.width)
        shape = [1] * value.dim()
        shape[0], shape[slots.axis] = entries.shape
        sizes = list(value.shape)
        sizes[slots.axis] = entries.shape[1]
        made[name] = value.gather(slots.axis, entries.view(shape).expand(sizes))
    steps: list[Step] = [{"path": place.bank, "module": put_smaller(bank, made)}]
    return [*steps, *_told(model, place, "width", keep.shape[1])]


@torch.no_grad()
def zero_channels(model: nn.Module, place: Experts, keep: Tensor) -> None:
    """Write zeros where the last matrix of each expert reads channels other than those that stay, (E, m)."""
    channels = _known(place)
    value = named_tensors(model.get_submodule(place.bank), [channels.down])[channels.down]
    gone = torch.ones(len(keep), channels.width, dtype=torch.bool).scatter_(1, keep.cpu(), value=False)
    shape = [1] * value.dim()
    shape[0], shape[channels.slots[channels.down].axis] = gone.shape
    value.masked_fill_(gone.view(shape).to(value.device), 0)


@torch.no_grad()
def write_down(model: nn.Module, place: Experts, expert: int, weight: Tensor, bias: Tensor | None) -> None:
    """Write the last matrix (O, M) of one expert, and what is added behind it (O,)."""
    channels = _known(place)
    names = [channels.down, *([channels.bias] if channels.bias else [])]
    tensors = named_tensors(model.get_submodule(place.bank), names)
    down = tensors[channels.down][expert]
    down.copy_(weight if channels.slots[channels.down].axis == 2 else weight.t())
    if channels.bias and bias is not None:
        tensors[channels.bias][expert].copy_(bias)


def record_steps(model: nn.Module, place: Experts, steps: Sequence[Step]) -> None:
    """Add steps to what is remembered of a model; sites in experts of a list have no gates any more."""
    record = record_of(model) or Record()
    inside = f"{place.bank}."
    barred = place.listed and any(step["module"]["type"] == SHORTENED for step in steps)
    why = f"{place.bank} has fewer experts"
    sites = tuple(
        replace(site, ungated=site.ungated or why) if barred and site.name.startswith(inside) else site
        for site in record.sites
    )
    set_record(model, Record(sites, [*record.steps, *steps], record.inputs))


def _known(place: Experts) -> ExpertChannels:
    if place.channels is None:
        raise ValueError(f"{place.bank}: its channels are not known")
    return place.channels


def _shortened(model: nn.Module, path: str, keep: list[int]) -> list[Step]:
    """Leave some modules of a list, whose activations are plain again: their paths change."""
    bank = model.get_submodule(path)
    for name, gate in [(name, part) for name, part in bank.named_modules() if isinstance(part, ChannelGate)]:
        replace_module(bank, name, gate.activation)
    shorten(bank, keep)
    return [{"path": path, "module": {"type": SHORTENED, "keep": keep}}]


def _told(model: nn.Module, place: Experts, meaning: ExpertNumber, value: int) -> list[Step]:
    """Set the numbers that count something; what was done."""
    found: dict[str, dict[str, int]] = {}
    for (path, name), what in place.attributes.items():
        if what == meaning:
            found.setdefault(path, {})[name] = value
    for path, values in found.items():
        set_attributes(model.get_submodule(path), values)
    return [{"path": path, "module": {"type": ATTRIBUTES, "values": values}} for path, values in found.items()]
