"""A narrower transformers model as a stock one: its config tells the widths it has, so that any runtime loads it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from linearize.errors import CheckpointError

__all__ = ["stock_copy"]


def stock_copy(model: nn.Module) -> nn.Module:
    """The same function as an ordinary model of its class, whose config is plainly true.

    For what `linearize.compress(..., stock=True)` makes of a transformers model: its FFNs are narrower, all alike, and
    hold no layer of ours. The number in the config that names their width (`intermediate_size`, for one) is found by
    trying which one gives a model with these very shapes.

    Returns:
        A new model, in eval mode: `save_pretrained` writes a folder that needs nothing of linearize.

    Raises:
        CheckpointError: the model is none of transformers, or no config describes it: layers of different widths,
            layers of ours, a bias where its class has none.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> config = BertConfig(hidden_size=8, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
        >>> stock_copy(BertModel(config)).config.intermediate_size
        32
    """
    name, config = type(model).__name__, getattr(model, "config", None)
    if config is None or not hasattr(config, "to_dict"):
        raise CheckpointError(name, "found no transformers config", "Save it with linearize.save instead.")
    ours = sorted({type(m).__name__ for m in model.modules() if type(m).__module__.startswith("linearize.")})
    if ours:
        found = f"found {ours[0]}, which no stock model has"
        raise CheckpointError(name, found, "Compress with stock=True, or save it with linearize.save.")
    turned = _turned(model, config)
    state = {key: value.t().contiguous() if key in turned else value for key, value in model.state_dict().items()}
    shapes = {key: tuple(value.shape) for key, value in state.items()}
    for described in _configs(model, config, shapes):
        if _shapes(type(model), described) == shapes:
            made = type(model)(described)
            made.load_state_dict(state)
            first = next(iter(state.values()))
            return made.to(first.device, next(model.parameters()).dtype).eval()
    remedy = "Compress with stock=True, which keeps equal widths and adds no bias, or save it with linearize.save."
    raise CheckpointError(name, "found no config of its class that gives these shapes", remedy)


def _turned(model: nn.Module, config: Any) -> set[str]:
    """Weights that the stock class stores the other way round (its `Conv1D`), where collapsing left a linear layer."""
    with torch.device("meta"):
        stock = type(model)(copy.deepcopy(config))
    return {
        f"{path}.weight"
        for path, module in stock.named_modules()
        if type(module).__name__ == "Conv1D" and isinstance(model.get_submodule(path), nn.Linear)
    }


def _configs(model: nn.Module, config: Any, shapes: dict[str, tuple[int, ...]]) -> Iterator[Any]:
    """The config as it is, and with one of its numbers changed to a width that the model has."""
    yield copy.deepcopy(config)
    before = _shapes(type(model), config)
    pairs = {
        (old, new)
        for key, shape in shapes.items()
        for old, new in zip(before.get(key, shape), shape, strict=False)
        if old != new
    }
    for key, value in config.to_dict().items():
        for old, new in sorted(pairs):
            if value == old or (value is None and ("inner" in key or "intermediate" in key or "ff" in key)):
                changed = copy.deepcopy(config)
                setattr(changed, key, new)
                yield changed


def _shapes(kind: type[nn.Module], config: Any) -> dict[str, tuple[int, ...]]:
    """Shapes of the state of a model of a config; nothing if there is no such model."""
    try:
        with torch.device("meta"):
            return {key: tuple(value.shape) for key, value in kind(copy.deepcopy(config)).state_dict().items()}
    except Exception:  # a config that its class refuses, in whatever way
        return {}
