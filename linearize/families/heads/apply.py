"""Carry out the removal of heads: zero what the projection reads of them, refit the rest, and slice all maps.

The first step changes weights alone; the second is exact: what is multiplied by zero is not computed any more.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from linearize.algebra.regression import Fit
from linearize.families.channels.editable import matrix, write_bias, write_matrix
from linearize.families.heads.place import Heads, counts
from linearize.sites.record import Record, Step, record_of, set_record
from linearize.sites.site import Port
from linearize.surgery.attributes import ATTRIBUTES, set_attributes
from linearize.surgery.specs import replace_module, spec_of
from linearize.tensors import held

__all__ = ["slice_heads", "without_heads"]


@torch.no_grad()
def without_heads(model: nn.Module, place: Heads, gone: Sequence[int], found: Fit | None = None) -> None:
    """Write zeros where the projection reads units that go, and a refitted weight where it reads the others."""
    weight = matrix(model, place.out)
    weight[:, place.columns(gone).to(weight.device)] = 0
    if found is not None:
        stay = [unit for unit in range(place.units) if unit not in set(gone)]
        weight[:, place.columns(stay).to(weight.device)] = found.weight.to(weight)
        if model.get_submodule(place.name)._parameters.get("bias") is not None:
            write_bias(model, place.out, found.bias.to(weight.device))
    write_matrix(model, place.out, weight)


@torch.no_grad()
def slice_heads(model: nn.Module, place: Heads, gone: Sequence[int]) -> list[Step]:
    """Take units out of all maps of an attention, and set the numbers that its code reads; what was done.

    The function stays the same if the projection reads nothing of these units.
    """
    steps: list[Step] = []
    for rows in {rows.port.module: rows for rows in place.attention.rows}.values():
        keep = place.left(rows.port.module, gone)
        if len(keep) < rows.port.total:
            steps.append(_sliced(model, rows.port, keep, outputs=True))
    lost = set(place.columns(gone).tolist())
    keep = torch.tensor([column for column in range(place.out.total) if column not in lost], dtype=torch.long)
    steps.append(_sliced(model, place.out, keep, outputs=False))
    after = counts(place.attention, place.units - len(gone))
    values: dict[str, dict[str, int]] = {}
    for (path, name), meaning in place.attributes.items():
        values.setdefault(path, {})[name] = after[meaning]
    for path, numbers in values.items():
        set_attributes(model.get_submodule(path), numbers)
        steps.append({"path": path, "module": {"type": ATTRIBUTES, "values": numbers}})
    return steps


def record_steps(model: nn.Module, steps: Sequence[Step]) -> None:
    """Add steps to what is remembered of a model."""
    record = record_of(model) or Record()
    set_record(model, Record(record.sites, [*record.steps, *steps], record.inputs))


def _sliced(model: nn.Module, port: Port, keep: Tensor, *, outputs: bool) -> Step:
    """Put a narrower layer in the place of a map."""
    old = model.get_submodule(port.module)
    weight, bias = held(old, "weight"), held(old, "bias")
    if weight is None:
        raise ValueError(f"{port.module} has no weight")
    whole = weight.t() if port.transposed else weight
    index = keep.to(whole.device)
    part = whole[index] if outputs else whole[:, index]
    layer = nn.Linear(part.shape[1], part.shape[0], bias is not None, device=part.device, dtype=part.dtype)
    layer.weight.copy_(part)
    layer.weight.requires_grad_(weight.requires_grad)
    if bias is not None:
        layer.bias.copy_(bias[index] if outputs else bias)
        layer.bias.requires_grad_(bias.requires_grad)
    replace_module(model, port.module, layer)
    return {"path": port.module, "module": spec_of(layer)}
