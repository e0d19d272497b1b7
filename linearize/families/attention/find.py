"""Which attentions one linear map, or nothing, could stand for: also those that keep keys and values in a cache."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from dataclasses import replace
from typing import Any

from torch import nn

from linearize.families.modules.find import wholes_of
from linearize.families.modules.place import Whole
from linearize.families.reading import read
from linearize.gating.groups import groups_of
from linearize.zoo.caches import INDEX, generates
from linearize.zoo.layers import indices_in, kinds_differ

__all__ = ["attention_wholes"]


def attention_wholes(
    model: nn.Module, batch: Any, memory: MutableMapping[str, Any] | None = None
) -> tuple[list[Whole], dict[str, str]]:
    """The attentions of a gated model that make one tensor of one; by path, why others stay.

    In a model that generates, an attention must keep its keys and values under a number of its own, so that the layers
    behind it can be numbered anew; and all layers must keep them in the same way.

    Args:
        model: gated.
        batch: one, for which costs are counted.
        memory: what is known of the model already.
    """
    owners = dict.fromkeys(one.owner for one in read(model, batch, memory).attentions if one.owner)
    kept = any(generates(module) for module in model.modules())
    reasons: dict[str, str] = {}
    for path in owners:
        why = _obstacle(model, path) if kept else None
        if why is not None:
            reasons[path] = why
    keepers = [path for path in owners if path not in reasons]
    found = [whole for whole in wholes_of(model, batch, groups_of(model), keepers) if whole.path in keepers]
    paths = {whole.path for whole in found}
    reasons |= {path: "it makes no tensor of its input's shape alone" for path in keepers if path not in paths}
    return [_without_more(model, whole, cached=kept) for whole in found], reasons


def _obstacle(model: nn.Module, path: str) -> str | None:
    """Why keys and values of an attention cannot go from a cache."""
    index = vars(model.get_submodule(path)).get(INDEX)
    if type(index) is not int:
        return "it may keep keys and values from call to call, in a way that is not known"
    if index not in indices_in(model, path):
        return "others keep keys and values under the same number"
    if kinds_differ(model):
        return "its layers keep keys and values in different ways, and would be mixed up"
    return None


def _without_more(model: nn.Module, whole: Whole, *, cached: bool) -> Whole:
    """The map has a bias only if the attention has one: formats for deployment know no other."""
    named: Mapping[str, Any] = dict(model.get_submodule(whole.path).named_parameters())
    biased = any(name.rpartition(".")[2].endswith("bias") for name in named)
    return replace(whole, inside="", bias=biased, caches=cached, alone=False)
