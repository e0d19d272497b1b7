"""What is known of caches of keys and values: which modules keep them, under which number, and how layers are counted.

transformers' attentions keep keys and values in an object that is passed along, under a number of their own,
`layer_idx`; its configurations say how many layers there are, and lists in them have an entry for each.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from linearize.errors import UsageError
from linearize.zoo.inputs import unwrap

__all__ = [
    "INDEX",
    "bytes_by_layer",
    "cache_in",
    "generates",
    "is_cache",
    "keepers",
    "keeps_keys",
    "left_over",
    "reading",
]

INDEX = "layer_idx"
_NAMES = ("cache", "past_key_values", "cache_params")  # of arguments and outputs, newest first


def generates(module: nn.Module) -> bool:
    """True if a model of transformers generates text, step by step.

    Examples:
        >>> generates(nn.Linear(2, 2))
        False
    """
    can = getattr(module, "can_generate", None)
    return callable(can) and bool(can())


def is_cache(value: Any) -> bool:
    """Whether an argument keeps keys and values from call to call."""
    return callable(getattr(value, "update", None)) and callable(getattr(value, "get_seq_length", None))


def keeps_keys(model: nn.Module, path: str) -> bool:
    """Whether a module of a model that generates keeps keys and values under a number of its own."""
    known = any(generates(module) for module in model.modules())
    return known and type(vars(model.get_submodule(path)).get(INDEX)) is int


def keepers(model: nn.Module) -> dict[str, int]:
    """By path, the number under which a module keeps keys and values: the innermost with that number."""
    found = {path: value for path, m in model.named_modules() if type(value := vars(m).get(INDEX)) is int}
    return {p: i for p, i in found.items() if not any(o.startswith(f"{p}.") and j == i for o, j in found.items())}


def left_over(cache: Any, count: int) -> int:
    """How many layers of a cache hold something beyond those that a model of so many uses."""
    layers = getattr(cache, "layers", None)
    return sum(map(_filled, layers[count:])) if isinstance(layers, list) else 0


def _filled(layer: Any) -> bool:
    keys, length = getattr(layer, "keys", None), getattr(layer, "get_seq_length", None)
    return isinstance(keys, Tensor) and keys.numel() > 0 and callable(length) and bool(length() > 0)


def reading(model: nn.Module, ids: Tensor, cache: Any = None) -> dict[str, Any]:
    """Arguments of a step of generation: tokens to read, the cache so far, and scores of the last token only.

    Raises:
        UsageError: the model's forward takes no cache.
    """
    parameters = inspect.signature(unwrap(model).forward).parameters
    name = next((name for name in _NAMES if name in parameters), None)
    if name is None or "input_ids" not in parameters:
        found = f"found a forward of {', '.join(parameters)}, without input_ids and a cache"
        raise UsageError(type(model).__name__, found, "Pass a decoder that generates text.")
    kwargs: dict[str, Any] = {"input_ids": ids}
    kwargs |= {"logits_to_keep": 1} if "logits_to_keep" in parameters else {}
    various = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    kwargs |= {"use_cache": True} if "use_cache" in parameters or various else {}
    return kwargs if cache is None else {**kwargs, name: cache}


def cache_in(output: Any) -> Any:
    """What a model keeps for the next step, from its output; None if it keeps nothing."""
    return next((value for name in _NAMES if (value := getattr(output, name, None)) is not None), None)


def bytes_by_layer(cache: Any) -> list[int]:
    """Bytes of all tensors that a cache keeps, layer by layer; of a cache without layers, all in one."""
    layers = getattr(cache, "layers", None)
    return [sum(t.nbytes for t in _tensors(layer)) for layer in (layers if isinstance(layers, list) else [cache])]


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for entry in value.values():
            yield from _tensors(entry)
    elif isinstance(value, list | tuple):
        for entry in value:
            yield from _tensors(entry)
    elif hasattr(value, "__dict__") and not isinstance(value, type | nn.Module):
        yield from _tensors(vars(value))
