"""Schemas: what a file may contain. Small checks of plain values are combined into one schema per format.

A check gets a value and its place in the file. It returns nothing, and raises `Unfit` if the value is not allowed. A
whole file is checked before anything in it is used.
"""

from __future__ import annotations

import json
import keyword
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

__all__ = [
    "Check",
    "Unfit",
    "array",
    "boolean",
    "each",
    "identifier",
    "integer",
    "mapping",
    "number",
    "one_of",
    "optional",
    "parse",
    "path",
    "plain_data",
    "scalar",
    "struct",
    "text",
    "union",
]

Check = Callable[[Any, str], None]

_IDENTIFIER = re.compile(r"[A-Za-z_]\w{0,99}", re.ASCII)
_MOST_PARTS = 64
LARGEST = 2**24
"""Largest size of anything that a file describes without holding it: channels, lengths, positions along one axis."""
_DEPTH = 20


class Unfit(ValueError):
    """A value that is not allowed at its place."""

    def __init__(self, where: str, value: Any, wanted: str) -> None:
        shown = repr(value) if isinstance(value, (str, int, float, bool, type(None))) else f"a {type(value).__name__}"
        super().__init__(f"{where or 'it'} is {shown[:80]}, not {wanted}")


def parse(source: str | bytes) -> Any:
    """JSON as plain data, whatever it holds.

    Raises:
        ValueError: it is no JSON, nested too deeply, or a number in it has too many digits.

    Examples:
        >>> parse('{"a": [1, 2.5]}')
        {'a': [1, 2.5]}
    """
    try:
        return json.loads(source)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def integer(low: int = 0, high: int = LARGEST) -> Check:
    """A whole number in a range; no bool."""

    def check(value: Any, where: str) -> None:
        if type(value) is not int or not low <= value <= high:
            raise Unfit(where, value, f"a whole number from {low} to {high}")

    return check


def number(low: float = -math.inf, high: float = math.inf) -> Check:
    """A finite number in a range; no bool."""

    def check(value: Any, where: str) -> None:
        fits = type(value) is float or (type(value) is int and abs(value) < 2**63)
        if not fits or not math.isfinite(value) or not low <= value <= high:
            raise Unfit(where, value, "a finite number" + (f" of at least {low}" if low > -math.inf else ""))

    return check


def boolean(value: Any, where: str) -> None:
    """True or False."""
    if type(value) is not bool:
        raise Unfit(where, value, "True or False")


def text(longest: int = 2000) -> Check:
    """A text that can be printed and encoded."""

    def check(value: Any, where: str) -> None:
        if type(value) is not str or len(value) > longest or "\0" in value:
            raise Unfit(where, value, f"a text of at most {longest} letters")
        if any("\ud800" <= letter <= "\udfff" for letter in value):
            raise Unfit(where, ascii(value), "a text that can be encoded")

    return check


def identifier(value: Any, where: str) -> None:
    """A name that may reach generated source: no keyword, no double underscore."""
    fits = type(value) is str and _IDENTIFIER.fullmatch(value) is not None
    if not fits or keyword.iskeyword(value) or value.startswith("__"):
        raise Unfit(where, value, "a name")


def path(value: Any, where: str) -> None:
    """Names of modules with dots between them; "" is the model itself."""
    if type(value) is not str or len(value) > 1000 or not value.isprintable() or value.count(".") > _MOST_PARTS:
        raise Unfit(where, value, "the path of a module")


def one_of(*known: Any) -> Check:
    """One of some values, type included."""

    def check(value: Any, where: str) -> None:
        if not any(type(value) is type(each) and value == each for each in known):
            raise Unfit(where, value, f"one of {', '.join(map(repr, known[:12]))}")

    return check


def optional(inner: Check) -> Check:
    """None, or what another check allows."""

    def check(value: Any, where: str) -> None:
        if value is not None:
            inner(value, where)

    return check


def union(*checks: Check) -> Check:
    """Whatever any of some checks allows. The error is that of the last one."""

    def check(value: Any, where: str) -> None:
        for each in checks[:-1]:
            try:
                return each(value, where)
            except Unfit:
                continue
        return checks[-1](value, where)

    return check


def array(inner: Check, longest: int = 1_000_000, shortest: int = 0) -> Check:
    """A list of values that one check allows."""

    def check(value: Any, where: str) -> None:
        if not isinstance(value, (list, tuple)) or not shortest <= len(value) <= longest:
            raise Unfit(where, value, f"a list of {shortest} to {longest} entries")
        for index, item in enumerate(value):
            inner(item, f"{where}[{index}]")

    return check


def each(*checks: Check) -> Check:
    """A list of fixed length, with a check for each place."""

    def check(value: Any, where: str) -> None:
        if not isinstance(value, (list, tuple)) or len(value) != len(checks):
            raise Unfit(where, value, f"a list of {len(checks)}")
        for index, (inner, item) in enumerate(zip(checks, value, strict=True)):
            inner(item, f"{where}[{index}]")

    return check


def mapping(key: Check, inner: Check, longest: int = 1_000_000) -> Check:
    """A dict whose keys and values two checks allow."""

    def check(value: Any, where: str) -> None:
        if not isinstance(value, dict) or len(value) > longest:
            raise Unfit(where, value, "names with values")
        for name, item in value.items():
            key(name, f"a key of {where}")
            inner(item, f"{where}.{name}" if where else name)

    return check


def struct(required: Mapping[str, Check], more: Mapping[str, Check] | None = None) -> Check:
    """A dict with known keys, each with its own check. Other keys are not allowed."""
    known = {**(more or {}), **required}

    def check(value: Any, where: str) -> None:
        if not isinstance(value, dict):
            raise Unfit(where, value, "names with values")
        for name in value:
            if name not in known:
                raise Unfit(f"a key of {where or 'it'}", name, f"one of {', '.join(known)}")
        for name in required:
            if name not in value:
                raise Unfit(where, "without " + name, "complete")
        for name, item in value.items():
            known[name](item, f"{where}.{name}" if where else name)

    return check


def scalar(value: Any, where: str) -> None:
    """None, a bool, a finite number, or a short text."""
    if value is not None and type(value) is not bool:
        union(number(), text(200))(value, where)


def plain_data(leaf: Check = scalar, *, depth: int = _DEPTH, entries: int = 100_000) -> Check:
    """Nested lists and dicts of a bounded depth and number of entries, with one check for all leaves."""

    def check(value: Any, where: str) -> None:
        left = entries

        def visit(inner: Any, deeper: int) -> None:
            nonlocal left
            left -= 1
            if deeper < 0 or left < 0:
                raise Unfit(where, value, f"plain data of depth {depth} at most, and {entries} entries")
            if isinstance(inner, (list, tuple)):
                for item in inner:
                    visit(item, deeper - 1)
            elif isinstance(inner, dict):
                for key, item in inner.items():
                    text(200)(key, f"a key in {where}")
                    visit(item, deeper - 1)
            else:
                leaf(inner, where)

        visit(value, depth)

    return check
