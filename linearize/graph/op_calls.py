"""What one call of an op is given and writes, by the op's schema."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch

__all__ = ["given_to", "numbers_of", "op_of", "written_of"]


class Entry(NamedTuple):
    """An argument in the schema of an op: its name, whether it may be a number to compute with, and is written."""

    name: str
    numeric: bool
    written: bool


Given = list[tuple[Entry, Any]]  # an op's arguments by its schema, and their values


@functools.cache
def _schema(func: Any) -> tuple[Entry, ...]:
    """The arguments of an op. To ask torch for them takes long. An int is a size, an axis or a position."""
    return tuple(
        Entry(
            argument.name,
            not any(word in str(argument.type) for word in ("int", "bool")),
            argument.alias_info is not None and argument.alias_info.is_write,
        )
        for argument in func._schema.arguments
    )


def given_to(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Given:
    """The arguments of an op's schema that a call gives, with their values."""
    entries = _schema(func)
    named = [(entry, kwargs[entry.name]) for entry in entries if entry.name in kwargs] if kwargs else []
    return [*zip(entries, args, strict=False), *named]


@functools.cache
def op_of(func: Any) -> str:
    """The name of an op, in place or not.

    Examples:
        >>> op_of(torch.ops.aten.relu_.default)
        'relu'
    """
    return str(func.overloadpacket).removeprefix("aten.").rstrip("_")


def written_of(given: Given) -> list[Any]:
    """What an op writes into."""
    return [value for entry, value in given if entry.written]


def numbers_of(func: Any, given: Given) -> Iterator[complex | str]:
    """Numbers that an op computes with, given as a tensor, scalar or float; an int is a size, an axis or a position."""
    for entry, value in given:
        if isinstance(value, (int, float, complex)) and entry.numeric:
            yield value
        elif func.overloadpacket is torch.ops.aten.lift_fresh and value.numel() == 1 and not value.is_meta:
            yield value.item()
