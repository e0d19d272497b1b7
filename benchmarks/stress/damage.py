"""Damage to files: bytes as disks and copies spoil them, and content that is wrong behind a checksum that is right."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from linearize.training.state import read_state, write_state

__all__ = ["BYTES", "forge", "spoil"]


def _flip(raw: bytearray, rng: random.Random) -> bytearray:
    for _ in range(rng.choice((1, 1, 3, 20))):
        raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
    return raw


def _cut(raw: bytearray, rng: random.Random) -> bytearray:
    return raw[: rng.randrange(len(raw))]


def _zero(raw: bytearray, rng: random.Random) -> bytearray:
    start = rng.randrange(len(raw))
    stop = min(len(raw), start + rng.choice((8, 64, 512)))
    raw[start:stop] = bytes(stop - start)
    return raw


def _splice(raw: bytearray, rng: random.Random) -> bytearray:
    start, other = rng.randrange(len(raw)), rng.randrange(len(raw))
    size = rng.choice((4, 32, 256))
    raw[start : start + size] = raw[other : other + size]
    return raw


def _insert(raw: bytearray, rng: random.Random) -> bytearray:
    place = rng.randrange(len(raw))
    return raw[:place] + rng.randbytes(rng.choice((1, 8, 100))) + raw[place:]


def _noise(raw: bytearray, rng: random.Random) -> bytearray:
    return bytearray(rng.randbytes(min(len(raw), rng.choice((0, 7, 8, 200)))))


def _digit(raw: bytearray, rng: random.Random) -> bytearray:
    """Another digit somewhere: JSON stays JSON."""
    places = [place for place, byte in enumerate(raw) if chr(byte).isdigit()]
    if places:
        raw[rng.choice(places)] = ord(rng.choice("0123456789"))
    return raw


BYTES: dict[str, Callable[[bytearray, random.Random], bytearray]] = {
    "flip": _flip,
    "cut": _cut,
    "zero": _zero,
    "splice": _splice,
    "insert": _insert,
    "noise": _noise,
    "digit": _digit,
}
"""Ways to spoil bytes, by name."""


def spoil(path: Path, rng: random.Random) -> str:
    """Spoil a file's bytes, and say how."""
    name = rng.choice(sorted(BYTES))
    path.write_bytes(bytes(BYTES[name](bytearray(path.read_bytes()), rng)))
    return name


_WRONG: tuple[Any, ...] = (None, "x", [], {}, [1, 2], torch.zeros(2, dtype=torch.bool), torch.zeros(0))


def forge(path: Path, rng: random.Random) -> str:
    """Take away something of the nest that a state is, or put something of another kind there; say what.

    The checksum fits. Other numbers in place of numbers are no damage that anybody could see.
    """
    state = read_state(path)
    holder, key = rng.choice(list(_places(state)))
    name = f"{key!r:.30}"
    counted = isinstance(holder, dict) and isinstance(key, int)  # by parameter: one that was never used has none
    if rng.random() < 0.4 and not counted:
        del holder[key]
        done = f"without {name}"
    else:
        value = rng.choice((*_WRONG, *_spoiled(holder[key], rng)))
        holder[key] = value
        done = f"{name} a {type(value).__name__}"
    write_state(path, state)
    return done


def _places(nest: Any) -> list[tuple[Any, Any]]:
    """Every (holder, key) of a nest of dicts and lists, each as likely as the others."""
    found: list[tuple[Any, Any]] = []
    entries = nest.items() if isinstance(nest, dict) else enumerate(nest) if isinstance(nest, list) else ()
    for key, value in entries:
        found.append((nest, key))
        if isinstance(value, dict) or (isinstance(value, list) and len(value) < 50):
            found += _places(value)
    return found


def _spoiled(value: Any, rng: random.Random) -> list[Any]:
    """Things of the same type that cannot be meant."""
    if isinstance(value, Tensor):
        return [value.flatten()[: max(0, value.numel() - 1)], value[None], value.to(torch.int8)]
    if isinstance(value, str):
        return [json.dumps({value: rng.random()})]
    return [type(value)()] if isinstance(value, dict | list | tuple) else []
