"""What is known of caches of keys and values: which modules keep them, under which number, and how layers are counted.

transformers' attentions keep keys and values in an object that is passed along, under a number of their own,
`layer_idx`; its configurations say how many layers there are, and lists in them have an entry for each.
"""

from __future__ import annotations

from typing import Any

from torch import nn

__all__ = ["INDEX", "generates", "is_cache", "keeps_keys"]

INDEX = "layer_idx"


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
