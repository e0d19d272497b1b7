"""What a generating model of transformers keeps from step to step as plain tensors, and back."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from linearize.zoo.unlike import Unlike

__all__ = ["argument_names", "cache_keyword", "cache_of", "pairs_of"]

Pair = tuple[Tensor, Tensor]


def argument_names(model: nn.Module) -> list[str]:
    """Names of the arguments of a model's forward."""
    return list(inspect.signature(model.forward).parameters)


def cache_keyword(model: nn.Module) -> str:
    """The argument under which a model takes its cache, and the name under which it gives it back."""
    return "cache" if "cache" in argument_names(model) else "past_key_values"


def pairs_of(output: Any, model: nn.Module) -> list[Pair]:
    """Keys and values of each layer, in what a model gives with `use_cache=True`.

    Raises:
        Unlike: it keeps something else.
    """
    from transformers import DynamicCache

    cache = getattr(output, cache_keyword(model), None)
    layers = getattr(cache, "layers", None)
    odd = [type(layer).__name__ for layer in layers or () if type(layer).__name__ != "DynamicLayer"]
    if type(cache) is not DynamicCache or not layers or odd:
        found = odd[0] if odd else type(cache).__name__
        why = f"keeps a {found} from step to step, where keys and values of all positions are expected"
        raise Unlike(type(model).__name__, why)
    filled = [layer.keys is not None for layer in layers]
    used = sum(filled)  # numbers run from 0; behind them are places for as many layers as the configuration says
    if not all(filled[:used]):
        why = f"keeps nothing for layer {filled.index(False)} and something for one behind it"
        raise Unlike(type(model).__name__, why)
    return [(layer.keys, layer.values) for layer in layers[:used]]


def cache_of(pairs: Sequence[Pair]) -> Any:
    """A cache that holds these keys and values."""
    from transformers import DynamicCache

    cache = DynamicCache()
    for i, (keys, values) in enumerate(pairs):
        cache.update(keys, values, i)
    return cache
