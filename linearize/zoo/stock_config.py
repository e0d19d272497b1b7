"""Find the numbers of a configuration that give a model of these shapes, by trying, without knowing their names."""

from __future__ import annotations

import copy
import itertools
import logging
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

_log = logging.getLogger(__name__)

Shapes = dict[str, tuple[int, ...]]
ConfigPlace = tuple[str | int, ...]
"""Where a number stands: names of attributes, and indices of lists."""
Change = tuple[ConfigPlace, int]

_OPEN = ("inner", "intermediate", "ff")  # names of widths that follow from others while they are None


def described(kind: type[nn.Module], config: Any, shapes: Shapes) -> Any:
    """A config with which the class gives a model of these shapes; None if changing some numbers is not enough.

    Numbers are changed one after the other: each must bring shapes that are wanted and no others. Where no single one
    does, two are tried together.
    """
    current = copy.deepcopy(config)
    now = shapes_of(kind, current)
    while now != shapes:
        wanted = {key for key, shape in shapes.items() if now.get(key) != shape}
        refused: list[Change] = []
        sizes = pairs(now, shapes)
        singles = [(place, new) for place, value in _numbers(current) for old, new in sizes if value in {old, None}]
        for changes in itertools.chain(((one,) for one in singles), _later(refused)):
            trial = _changed(current, changes)
            then = shapes_of(kind, trial) if trial is not None else {}
            if not then and len(changes) == 1:
                refused += changes
            moved = {key for key in now.keys() | then.keys() if now.get(key) != then.get(key)}
            # Other axes of the same tensors may wait for another number: an entry that moves must move nearer.
            if then and moved and moved <= wanted and all(_nearer(now, then, shapes, key) for key in moved):
                current, now = trial, then
                break
        else:
            return None
    return current


def _later(refused: list[Change]) -> Iterator[tuple[Change, Change]]:
    """Pairs of changes that a class refuses one by one; asked for when those are known."""
    yield from (two for two in itertools.combinations(refused, 2) if two[0][0] != two[1][0])


def shapes_of(kind: type[nn.Module], config: Any) -> Shapes:
    """Shapes of the state of a model of a config; empty if there is no such model."""
    try:
        with torch.device("meta"):
            return {key: tuple(value.shape) for key, value in kind(copy.deepcopy(config)).state_dict().items()}
    except Exception as error:  # a config that its class refuses, in whatever way
        _log.debug("%s refuses a configuration: %s", kind.__name__, error)
        return {}


def _nearer(now: Shapes, then: Shapes, wanted: Shapes, key: str) -> bool:
    old, new, goal = now.get(key), then.get(key), wanted.get(key)
    if goal is None:
        return new is None
    if new is None or len(new) != len(goal):
        return False
    if old is None or len(old) != len(goal):
        return new == goal
    return all(n in {o, g} for o, n, g in zip(old, new, goal, strict=True))


def pairs(now: Shapes, wanted: Shapes) -> list[tuple[int, int]]:
    """Sizes that differ: (what it is, what it shall be).

    Examples:
        >>> pairs({"weight": (8, 3)}, {"weight": (5, 3)})
        [(8, 5)]
    """
    both = [(now[key], shape) for key, shape in wanted.items() if len(now.get(key, ())) == len(shape)]
    return sorted({(o, w) for old, want in both for o, w in zip(old, want, strict=True) if o != w})


def _numbers(config: Any, place: ConfigPlace = ()) -> Iterator[tuple[ConfigPlace, int | None]]:
    """The whole numbers of a config, of the configs inside and of its lists; and widths that are left open."""
    if isinstance(config, list):
        items: list[tuple[str | int, Any]] = list(enumerate(config))
    else:
        items = [(name, getattr(config, name, None)) for name in config.to_dict()]
    for name, value in items:
        open_width = value is None and any(part in str(name) for part in _OPEN)
        if open_width or (isinstance(value, int) and not isinstance(value, bool)):
            yield (*place, name), value
        elif hasattr(value, "to_dict") or isinstance(value, list):
            yield from _numbers(value, (*place, name))


def _changed(config: Any, changes: tuple[Change, ...]) -> Any:
    """A copy of a config with other numbers; None if it refuses them."""
    made = copy.deepcopy(config)
    try:
        for place, value in changes:
            holder: Any = made
            for name in place[:-1]:
                holder = holder[name] if isinstance(name, int) else getattr(holder, name)
            last = place[-1]
            if isinstance(last, int):
                holder[last] = value
            else:
                setattr(holder, last, value)
    except Exception as error:  # a config may check what it is given, in whatever way
        _log.debug("a configuration refuses a number: %s", error)
        return None
    return made


def misfit(now: Shapes, wanted: Shapes) -> tuple[str, str]:
    """The first tensor that keeps any config from describing these shapes, and why, as a part of a sentence.

    Examples:
        >>> misfit({"0.weight": (8, 3), "1.weight": (8, 3)}, {"0.weight": (5, 3), "1.weight": (4, 3)})
        ('1.weight', 'is 4 x 3 where 0.weight is 5 x 3, and one number is for both')
    """
    for key in wanted:
        if key not in now:
            return key, "is no tensor of a stock model"
    for key in now:
        if key not in wanted:
            return key, "is missing, and a stock model has it"
    first: dict[tuple[str, tuple[int, ...]], str] = {}
    for key, shape in wanted.items():
        other = first.setdefault((re.sub(r"\d+", "", key), now[key]), key)
        if wanted[other] != shape:
            return (
                key,
                f"is {_told(shape)} where {other} is {_told(wanted[other])}, and one number is for both",
            )
    key = next(key for key, shape in wanted.items() if now[key] != shape)
    return key, f"is {_told(wanted[key])}, and no number gives that"


def _told(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "a number"
