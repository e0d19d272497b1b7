"""The attentions of a gated model whose heads may go."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from typing import Any

from torch import nn

from linearize.families.heads.carry import carried
from linearize.families.heads.place import Heads
from linearize.families.reading import read
from linearize.graph.attention import Attention
from linearize.sites.record import record_of
from linearize.sites.select import UNSELECTED
from linearize.tensors import meddler, oddity
from linearize.zoo.caches import keeps_keys

__all__ = ["heads_of", "told"]


def heads_of(
    model: nn.Module, batch: Any, memory: MutableMapping[str, Any] | None = None
) -> tuple[list[Heads], dict[str, str]]:
    """The attentions of which heads may go, in order of execution; by path, why heads of others stay.

    Args:
        model: gated.
        batch: one, for which costs are counted.
        memory: what is known of the model already.
    """
    record = record_of(model)
    known = read(model, batch, memory)
    if record is not None and any(site.ungated in UNSELECTED for site in record.sites):
        chosen = "include= or exclude= chooses among activations, and heads belong to none"
        return [], {one.owner: chosen for one in known.attentions}
    found, inputs, times = known.attentions, known.inputs, known.times
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
