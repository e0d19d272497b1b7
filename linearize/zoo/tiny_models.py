"""Tiny models of transformers, one for each model type."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

from linearize.errors import UsageError
from linearize.zoo.building import Limit, parameters_on_meta
from linearize.zoo.tiny import LEVELS, tiny_config


def model_class(config: Any) -> Any:
    """The bare model class of a configuration, else one for the first task that has any.

    Raises:
        UsageError: no mapping of transformers knows the configuration.
    """
    from transformers.models.auto import modeling_auto

    mappings = ["MODEL_MAPPING", *(name for name in vars(modeling_auto) if name.endswith("_MAPPING"))]
    for name in mappings:
        mapping = getattr(modeling_auto, name)
        if type(config) in mapping:
            found = mapping[type(config)]
            return found[0] if isinstance(found, (list, tuple)) else found
    raise UsageError(config.model_type, "no model class takes this configuration alone", "It is part of others.")


def tiny_models(
    model_type: str, *, elements: float = 1.5e8, levels: Iterable[int] = range(LEVELS)
) -> Iterator[tuple[int, nn.Module]]:
    """Models of a type with random weights, smallest first: (level, model in eval mode); the next if one will not run.

    Args:
        model_type: a key of transformers' ``CONFIG_MAPPING``.
        elements: how large a model may be.
        levels: which sizes to try.

    Raises:
        UsageError: no level gives a model; with the reason of the first.

    Examples:
        >>> level, model = next(tiny_models("gpt2"))
        >>> level, type(model).__name__
        (0, 'GPT2Model')
    """
    first: UsageError | None = None
    made = 0
    for level in levels:
        try:
            config = tiny_config(model_type, level)
            cls = model_class(config)
            with parameters_on_meta(Limit(elements)):
                cls(config)
            model = cls(tiny_config(model_type, level)).eval()
        except UsageError as error:
            first = first or error
            continue
        except Exception as error:  # any constructor of hundreds
            found = f"cannot be built: {type(error).__name__}: {error}"
            first = first or UsageError(model_type, found, "Try a gentler level.")
            continue
        made += 1
        yield level, model
    if not made and first is not None:
        raise first
