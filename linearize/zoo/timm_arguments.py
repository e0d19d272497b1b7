"""Which arguments of a timm model a file may give: names that the model's own code takes, values of their types.

What a model takes is read from timm itself: the function that is registered under the name, the functions and classes
of its file that it refers to, and what these take out of their keyword arguments. Nothing is called for that.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import keyword
import math
import re
import types
from collections.abc import Iterator
from typing import Any

from torch import nn

from linearize.errors import UsageError
from linearize.zoo.plain import IDENTIFIER, is_plain

__all__ = ["NEVER", "check_arguments"]

NEVER = re.compile(
    r".*pretrained.*|.*checkpoint.*|(.*_)?(path|file|dir|url|hub_id|weights)|device|dtype|name|model_name|self|"
    r"exportable|scriptable|no_jit|kwargs|args|variant|model|model_cfg|feature_cfg|kwargs_filter|_.*"
)
"""Arguments that reach for files or addresses, are the function's own, or change what a constructor gives back."""

_WORD = re.compile(r"(?!\.)[\w.+\-]{0,100}", re.ASCII)
_COUNTS = re.compile(r"(.*_)?(depths?|layers|blocks|repeats|stages|heads|groups|num_reg_tokens)")
_LARGEST, _MOST = 2**24, 10_000
_BUILDER = {"features_only", "out_indices", "pruned", "bn_eps", "bn_momentum"}  # which timm takes for all its models
_TAKING = {"pop", "get", "setdefault"}
_NO_MODELS = re.compile(r"timm\.models\._(builder|factory|features\w*|hub|manipulate|pretrained|registry)")
_KINDS: dict[type, re.Pattern[str]] = {
    bool: re.compile(r"\bbool\b", re.IGNORECASE),
    int: re.compile(r"\b(int|float|number|size)\b", re.IGNORECASE),
    float: re.compile(r"\b(int|float|number|size)\b", re.IGNORECASE),
    str: re.compile(r"\b(str|literal|layertype)\b", re.IGNORECASE),
    list: re.compile(r"\b(tuple|list|sequence|iterable|collection|dict|mapping)\b|tuple_", re.IGNORECASE),
    dict: re.compile(r"\b(dict|mapping|cfg|tuple|list|sequence)\b", re.IGNORECASE),
}
_SCALARS = (bool, int, float)
_REST = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)


def check_arguments(name: str, kwargs: Any) -> dict[str, Any]:
    """Arguments of ``timm.create_model`` from a file, if the model takes them, and they reach for nothing.

    Args:
        name: of the model, with or without a tag.
        kwargs: its arguments.

    Raises:
        UsageError: an argument is not plain, none that this model takes, not of the type that it has there, or a number
            out of any range.

    Examples:
        >>> check_arguments("test_vit", {"num_classes": 10})
        {'num_classes': 10}
    """
    if not isinstance(kwargs, dict) or not is_plain(kwargs, simple=True):
        raise UsageError(name, "found arguments that are not plain data", "The recipe was not written by linearize.")
    known = _known(name.partition(".")[0])
    for key, value in kwargs.items():
        taken = known is None or key in known or key.partition("_")[2] in _fields(name.partition(".")[0])
        if NEVER.fullmatch(key) or not IDENTIFIER.fullmatch(key) or keyword.iskeyword(key) or not taken:
            raise UsageError(name, f"found the argument {key!r:.80}", "A recipe may not set it.")
        fits = any(_fits(value, parameter) for parameter in (known or {}).get(key, [None]))
        if not fits or not _in_range(value, _MOST if _COUNTS.fullmatch(key) else _LARGEST):
            raise UsageError(name, f"found {key}={value!r:.80}", "The recipe was not written by linearize.")
    return kwargs


def _in_range(value: Any, most: int) -> bool:
    """True for words, and for numbers of any model's size."""
    if isinstance(value, dict):
        return all(not NEVER.fullmatch(key) and _in_range(item, most) for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return len(value) <= 1000 and all(_in_range(item, most) for item in value)
    if isinstance(value, str):
        return _WORD.fullmatch(value) is not None
    return value is None or (math.isfinite(value) and abs(value) <= most)


def _fits(value: Any, parameter: inspect.Parameter | None) -> bool:
    """Whether a value is of the type that a parameter says, or of its default's."""
    if parameter is None or value is None:
        return True
    kind = list if isinstance(value, tuple) else type(value)
    if parameter.annotation is not inspect.Parameter.empty:
        told = inspect.formatannotation(parameter.annotation)
        return "Any" in told or _KINDS[kind].search(told) is not None
    default = parameter.default
    if default is inspect.Parameter.empty or default is None or isinstance(default, (list, tuple, dict)):
        return True
    if isinstance(default, _SCALARS):  # a number for each stage, or axis, stands for one of them
        return kind in _SCALARS or (kind is list and not isinstance(default, bool))
    return kind is str  # another word, or the name of a layer in the place of its class


def _entrypoint(name: str) -> Any:
    try:
        import timm
    except ImportError:
        return None
    return timm.models.model_entrypoint(name) if timm.is_model(name) else None


@functools.cache
def _known(name: str) -> dict[str, list[inspect.Parameter | None]] | None:
    """What the model of a name takes, with its parameters of that name; None if there is no such model."""
    start = _entrypoint(name)
    if start is None:
        return None  # which is for timm to say
    found: dict[str, list[inspect.Parameter | None]] = {key: [None] for key in _BUILDER}
    reached = list(_reached(start))
    for function in reached:
        passes = function.__code__.co_flags & inspect.CO_VARKEYWORDS
        for key, parameter in inspect.signature(function).parameters.items():
            if (passes or function.__name__ == "__init__") and parameter.kind not in _REST:
                found.setdefault(key, []).append(parameter)
    for key in (*(key for function in reached for key in _taken(function)), *_fields(name)):
        found.setdefault(key, [None])
    return found


def _reached(start: Any) -> Iterator[types.FunctionType]:
    """The functions of timm's model files that a function refers to, and the constructors of their modules."""
    seen, waiting = set(), [inspect.unwrap(start)]
    while waiting:
        function = waiting.pop()
        if function in seen:
            continue
        seen.add(function)
        yield function
        if function.__name__ == "__init__":  # what a module is made of is its own affair
            continue
        for name in function.__code__.co_names:
            value = function.__globals__.get(name)
            if isinstance(value, types.FunctionType) and _of_models(value):
                waiting.append(inspect.unwrap(value))
            elif isinstance(value, type) and issubclass(value, nn.Module):
                waiting += [
                    vars(cls)["__init__"] for cls in value.__mro__ if _of_models(cls) and "__init__" in vars(cls)
                ]


def _of_models(value: Any) -> bool:
    module = str(value.__module__)
    return module.startswith("timm.models.") and not _NO_MODELS.fullmatch(module)


def _taken(function: types.FunctionType) -> Iterator[str]:
    """Names that a function may take out of its keyword arguments."""
    code = function.__code__
    if code.co_flags & inspect.CO_VARKEYWORDS and _TAKING & {*code.co_names}:
        yield from (text for text in code.co_consts if isinstance(text, str) and IDENTIFIER.fullmatch(text))


@functools.cache
def _fields(name: str) -> frozenset[str]:
    """Fields of the configurations that the model's file describes, which arguments replace one by one."""
    start = _entrypoint(name)
    held = {} if start is None else inspect.unwrap(start).__globals__
    kinds = [value for value in held.values() if isinstance(value, type) and dataclasses.is_dataclass(value)]
    return frozenset(field.name for kind in kinds if _of_models(kind) for field in dataclasses.fields(kind))
