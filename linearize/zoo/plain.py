"""Plain data: what a file may contain, and how tuples are kept in JSON.

Plain data are None, bools, numbers, strings, and lists, tuples and dicts with string keys of plain data. Data
from a file must follow a stricter rule, `SIMPLE`: its strings are names, never paths, addresses or code.
"""

from __future__ import annotations

import math
import re
from typing import Any

SIMPLE = re.compile(r"[\w .+\-]{0,200}", re.ASCII)
"""Strings that a file may set: letters, digits, dots, dashes; no slash, colon or bracket."""

IDENTIFIER = re.compile(r"[A-Za-z_]\w{0,99}", re.ASCII)
"""Names of classes and arguments."""

_TUPLE = "__tuple__"
_MAX_DEPTH = 20


def is_plain(value: object, *, simple: bool = False, depth: int = 0) -> bool:
    """Whether ``value`` is plain data; with ``simple`` its strings must also match `SIMPLE`.

    Examples:
        >>> is_plain({"size": (3, 224)}), is_plain(len), is_plain("a/b", simple=True)
        (True, False, False)
    """
    if depth > _MAX_DEPTH:
        return False
    if value is None or type(value) in (bool, int, float):
        return True
    if type(value) is str:
        return not simple or SIMPLE.fullmatch(value) is not None
    if isinstance(value, (list, tuple)) and type(value) in (list, tuple):
        return all(is_plain(item, simple=simple, depth=depth + 1) for item in value)
    if isinstance(value, dict) and type(value) is dict:
        keys_fit = all(type(key) is str and key != _TUPLE and is_plain(key, simple=simple) for key in value)
        return keys_fit and all(is_plain(item, simple=simple, depth=depth + 1) for item in value.values())
    return False


def pack(value: Any) -> Any:
    """Plain data as JSON can hold it: a tuple becomes ``{"__tuple__": [...]}``.

    Examples:
        >>> pack({"size": (3, 224)})
        {'size': {'__tuple__': [3, 224]}}
    """
    if isinstance(value, tuple):
        return {_TUPLE: [pack(item) for item in value]}
    if isinstance(value, list):
        return [pack(item) for item in value]
    if isinstance(value, dict):
        return {key: pack(item) for key, item in value.items()}
    return value


def unpack(value: Any) -> Any:
    """The inverse of `pack`.

    Examples:
        >>> unpack({"size": {"__tuple__": [3, 224]}})
        {'size': (3, 224)}
    """
    if isinstance(value, list):
        return [unpack(item) for item in value]
    if isinstance(value, dict):
        if set(value) == {_TUPLE} and isinstance(value[_TUPLE], list):
            return tuple(unpack(item) for item in value[_TUPLE])
        return {key: unpack(item) for key, item in value.items()}
    return value


def same(a: object, b: object) -> bool:
    """Equality of plain data in value and type; NaN equals NaN.

    Examples:
        >>> same((1, 2), [1, 2]), same(float("nan"), float("nan"))
        (False, True)
    """
    if type(a) is not type(b):
        return False
    if isinstance(a, float) and isinstance(b, float):
        return a == b or (math.isnan(a) and math.isnan(b))
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(item, b[key]) for key, item in a.items())
    return bool(a == b)
