"""What transformers' own configuration classes have: their settings, defaults, parts, and the kinds of values."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Mapping
from typing import Any

__all__ = ["class_of", "defaults_of", "fits_default", "is_numbers", "settings_of"]


@functools.cache
def _model_types() -> frozenset[str]:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    return frozenset(CONFIG_MAPPING_NAMES)


def class_of(part: Any, value: dict[str, Any]) -> Any:
    """The configuration class of a part: as its owner says, else as its own `model_type` says."""
    import transformers

    if isinstance(part, type) and issubclass(part, transformers.PreTrainedConfig):
        return part
    name = value.get("model_type")
    if not isinstance(name, str) or name not in _model_types():
        return None
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return CONFIG_MAPPING[name]


@functools.cache
def settings_of(cls: Any) -> frozenset[str]:
    """Names that a configuration class takes: its fields, its constructors' arguments, and its own other names."""
    known = {*getattr(cls, "attribute_map", {})}
    if dataclasses.is_dataclass(cls):
        known |= {field.name for field in dataclasses.fields(cls)}
    for base in cls.__mro__:
        if base.__module__.split(".")[0] == "transformers" and "__init__" in vars(base):
            known |= {*inspect.signature(base.__init__).parameters}
    return frozenset(known - {"self", "args", "kwargs"})


@functools.cache
def defaults_of(cls: Any) -> Mapping[str, Any]:
    """All that an instance has, by name."""
    try:
        return dict(vars(cls()))
    except Exception:  # a class that needs arguments
        return {}


def fits_default(value: Any, default: Any) -> bool:
    """Whether a value can stand where a class has a default: no number for a switch, no text or name for a number.

    Examples:
        >>> fits_default(True, False), fits_default(0.5, False), fits_default([2, 3], 4), fits_default({"a": "b"}, 4)
        (True, False, True, False)
    """
    if value is None or not isinstance(default, bool | int | float):
        return True
    if isinstance(default, bool):
        return isinstance(value, bool | list | tuple) or value in (0, 1)
    return is_numbers(list(value.values()) if isinstance(value, dict) else value)


def is_numbers(value: Any) -> bool:
    """Whether a value is a number, a switch or None, or a list of such."""
    if isinstance(value, (list, tuple)):
        return all(is_numbers(item) for item in value)
    return type(value) in (int, float, bool) or value is None
