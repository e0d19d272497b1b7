"""The attentions of a gated model whose heads may go."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from linearize.errors import CaptureError
from linearize.families.heads.carry import carried
from linearize.families.heads.place import Heads
from linearize.graph.attention import Attention, attentions_of
from linearize.graph.capture import Inputs
from linearize.running.models import batches_of
from linearize.tensors import meddler, oddity
from linearize.zoo.caches import keeps_keys

__all__ = ["heads_of", "one_sample"]


def heads_of(model: nn.Module, batch: Any) -> tuple[list[Heads], dict[str, str]]:
    """The attentions of which heads may go, in order of execution; by path, why heads of others stay.

    Args:
        model: gated.
        batch: one, for which costs are counted; the graph is captured for its first sample, which tells the heads'
            axis from the batch's.
    """
    whole = batches_of(batch)[0]
    inputs, times = one_sample(whole)
    try:
        found, _ = attentions_of(model, inputs)
    except CaptureError:
        if times == 1:
            return [], {}
        inputs, times = whole, 1.0
        try:
            found, _ = attentions_of(model, inputs)
        except CaptureError:
            return [], {}
    reasons = {one.owner: one.reason for one in found if one.reason is not None}
    good: dict[str, Heads] = {}
    for one in found:
        if one.out is None:
            continue
        why = _obstacle(model, one)
        if why is None and one.out.module in good:
            why = "its projection belongs to another attention, too"
        if why is not None:
            reasons[one.owner] = why
            continue
        good[one.out.module] = Heads(one, batch=times, cached=keeps_keys(model, one.owner))
    places, more = carried(model, list(good.values()), inputs)
    return places, reasons | more


def one_sample(batch: Inputs) -> tuple[Inputs, float]:
    """The first sample of a batch, and how many there are."""
    sizes = [leaf.shape[0] for leaf in pytree.tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.dim()]
    size = sizes[0] if sizes else 1
    if size < 2:
        return batch, 1.0

    def first(tensor: Tensor) -> Tensor:
        return tensor[:1] if tensor.dim() and tensor.shape[0] == size else tensor

    cut: Inputs = pytree.tree_map_only(Tensor, first, batch)
    return cut, float(size)


def _obstacle(model: nn.Module, one: Attention) -> str | None:
    """Why its maps cannot be made narrower."""
    ports = [rows.port for rows in one.rows] + ([] if one.out is None else [one.out])
    for port in ports:
        module = model.get_submodule(port.module)
        found = meddler(module)
        if found is not None:
            return f"{port.module} has {found}, which would be lost"
        weight = module._parameters.get("weight")
        if weight is None or oddity(weight) is not None or weight.dim() != 2:
            return f"the weight of {port.module} is computed, or no plain matrix"
    return None


def told(reasons: Mapping[str, str]) -> list[str]:
    """The reasons in a few words, each once.

    Examples:
        >>> told({"a.0": "too wide", "a.1": "too wide", "b": "odd"})
        ['heads stay in a.0 (and 1 more): too wide', 'heads stay in b: odd']
    """
    places: dict[str, list[str]] = {}
    for path, why in reasons.items():
        places.setdefault(why, []).append(path or "the model")
    return [
        f"heads stay in {some[0]}{f' (and {len(some) - 1} more)' if len(some) > 1 else ''}: {why}"
        for why, some in places.items()
    ]
