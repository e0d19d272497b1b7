"""Checks of arguments that are numbers, texts, paths and functions."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import Any, NoReturn

from torch import Tensor, nn

from linearize.errors import UsageError

_LONGEST = 80  # characters of a value in a message


def refuse(name: str, value: Any, expected: str) -> NoReturn:
    """Raise the error of every check: the argument, the value found, what to pass."""
    raise UsageError(name, f"found {_shown(value)}", f"Pass {expected}.")


def _shown(value: Any) -> str:
    """A value in a message; only its type, if it is long, or cannot say what it is."""
    kind = f"a {type(value).__name__}"
    if isinstance(value, Tensor | nn.Module):
        return kind
    try:
        told = repr(value)
    except Exception:  # of a stranger's class, or of a number with too many digits
        return kind
    return kind if len(told) > _LONGEST or " at 0x" in told else told


def is_number(value: Any) -> bool:
    """True for a real number of Python or NumPy, but not for a bool."""
    return isinstance(value, Real) and not isinstance(value, bool)


def is_whole(value: Any) -> bool:
    """True for a value of a whole-number type of Python or NumPy, but not for a bool."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def whole(name: str, value: Any, least: int = 0, *, most: int = 2**53) -> int:
    """Check for a whole number of at least `least`, and at most `most`.

    Raises:
        UsageError: otherwise; the number 2.0 is none, nor is True.

    Examples:
        >>> whole("epochs", 3, least=1)
        3
    """
    if not is_whole(value) or value < least:
        refuse(name, value, f"a whole number of at least {least}")
    if value > most:
        refuse(name, value, f"a whole number from {least} to {most}")
    return int(value)


def wholes(name: str, values: Any, least: int = 1) -> tuple[int, ...]:
    """Check for one or more whole numbers. A single number becomes a list.

    Raises:
        UsageError: otherwise.
    """
    expected = f"a list of whole numbers of at least {least}, such as [1, 32]"
    listed = [values] if is_whole(values) else values
    if isinstance(listed, Tensor):
        listed = None if listed.is_meta or listed.dim() != 1 else listed.tolist()
    if isinstance(listed, str | bytes | Mapping) or not isinstance(listed, Iterable):
        refuse(name, values, expected)
    found = list(listed)
    if not found or not all(is_whole(value) and value >= least for value in found):
        refuse(name, values, expected)
    return tuple(int(value) for value in found)


def number(
    name: str, value: Any, *, least: float = -math.inf, most: float = math.inf, above: float = -math.inf
) -> float:
    """Check for a finite number of at least `least`, above `above`, and at most `most`.

    Raises:
        UsageError: otherwise.

    Examples:
        >>> number("lr", 1e-3, least=0)
        0.001
    """
    if not is_number(value) or not _is_finite(value) or not (least <= value <= most and value > above):
        bounds = [f"of at least {least:g}"] * (least > -math.inf) + [f"above {above:g}"] * (above > -math.inf)
        bounds += [f"up to {most:g}"] * (most < math.inf)
        refuse(name, value, " ".join(["a finite number", *bounds]))
    return float(value)


def _is_finite(value: Any) -> bool:
    """Whether a float can be this number."""
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def share(name: str, value: Any, of: str = "share", *, positive: bool = False) -> float:
    """Check for a number from 0 to 1; above 0 if `positive`.

    Raises:
        UsageError: otherwise.
    """
    if not is_number(value) or not 0 <= value <= 1 or (positive and not value):
        refuse(name, value, f"a {of} {'above 0 and up to' if positive else 'from 0 to'} 1")
    return float(value)


def boolean(name: str, value: Any) -> bool:
    """Check for True or False, and nothing that only counts as one of them.

    Raises:
        UsageError: otherwise.
    """
    if not isinstance(value, bool):
        refuse(name, value, "True or False")
    return value


def seed(name: str, value: Any) -> int:
    """Check for a seed that every random generator accepts.

    Raises:
        UsageError: otherwise.
    """
    if not is_whole(value) or not 0 <= value < 2**63:
        refuse(name, value, "a whole number of at least 0")
    return int(value)


def choice(name: str, value: Any, known: Sequence[str]) -> str:
    """Check for one of some words.

    Raises:
        UsageError: otherwise.
    """
    if not isinstance(value, str) or value not in known:
        refuse(name, value, "one of " + ", ".join(f'"{word}"' for word in known))
    return value


def function(name: str, value: Any, expected: str = "a function") -> Callable[..., Any]:
    """Check for something that can be called.

    Raises:
        UsageError: otherwise.
    """
    if not callable(value):
        refuse(name, value, expected)
    called: Callable[..., Any] = value
    return called


def patterns(name: str, value: Any, expected: str = "a glob pattern, or a list of these") -> tuple[str, ...]:
    """Check for glob patterns; a text is one pattern.

    Raises:
        UsageError: otherwise.
    """
    found = (value,) if isinstance(value, str) else value
    if isinstance(found, bytes | Mapping | Tensor) or not isinstance(found, Iterable):
        refuse(name, value, expected)
    listed = tuple(found)
    if not all(isinstance(pattern, str) for pattern in listed):
        refuse(name, value, expected)
    return listed


def path(name: str, value: Any) -> Path:
    """Check for a path that a file system accepts.

    Raises:
        UsageError: it is neither text nor a path, or holds a null character.
    """
    if not isinstance(value, str | os.PathLike):
        refuse(name, value, "the path of a file, as text or as a pathlib.Path")
    text = os.fspath(value)
    if not isinstance(text, str) or "\0" in text or not text:
        refuse(name, value, "the path of a file, as text or as a pathlib.Path")
    return Path(text)


def folder(name: str, value: Any) -> Path:
    """Check for a folder that exists or can be made; it is not made here.

    Raises:
        UsageError: it is no path, or the path of something else than a folder.
    """
    if not isinstance(value, str | os.PathLike):
        refuse(name, value, "the path of a folder, new or not")
    found = path(name, value)
    try:
        wrong = next((str(part) for part in (found, *found.parents) if part.exists() and not part.is_dir()), None)
    except OSError as error:
        raise UsageError(name, f"cannot use {found}: {error.strerror}", "Pass a folder, new or not.") from error
    if wrong is not None:
        raise UsageError(name, f"found {wrong}, which is no folder", "Pass a folder, new or not.")
    return found


def plain_number(value: Any) -> Any:
    """A number of NumPy as one of Python; anything else as it is."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return value
    return int(value) if isinstance(value, Integral) else float(value)
