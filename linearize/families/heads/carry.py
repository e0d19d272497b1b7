"""Whether the code around an attention takes fewer heads, and which numbers that it reads follow: found by trying.

Heads are zeroed in a copy of the model, which runs; then they are sliced away, and it runs again. What comes out must
be the same, for any weights: the copy's attentions get random ones, since a freshly made attention looks everywhere
alike, and would hide every mistake. Numbers that could count heads are told by their values; where these are
ambiguous, one reading after the other is tried.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from linearize.errors import CollapseError, LinearizeError
from linearize.families.heads.apply import slice_heads, without_heads
from linearize.families.heads.place import HeadNumber, Heads, counts
from linearize.families.trials import apart, outputs_of, roughened
from linearize.graph.capture import Inputs
from linearize.graph.dryrun import first_line
from linearize.running.copies import duplicate
from linearize.surgery.attributes import whole_numbers_of
from linearize.surgery.specs import replace_module

__all__ = ["carried"]

_WIDTHS = ("dim", "size", "width", "embed", "feature", "channel", "nx", "nf")
_PER_HEAD = ("head_dim", "head_size", "dim_head", "head_width", "dim_per_head", "size_per_head")
_MOST = 48  # readings tried at a place

Followed = dict[tuple[str, str], HeadNumber]


def carried(model: nn.Module, places: Sequence[Heads], inputs: Inputs) -> tuple[list[Heads], dict[str, str]]:
    """The places where heads can go, told which numbers follow; and by owner, why others cannot.

    Args:
        model: gated; it is left as it was.
        places: found in its graph.
        inputs: on which it runs, of one sample or a few.
    """
    if not places:
        return [], {}
    trial = duplicate(model, CollapseError)
    paths = [path for place in places for path in (*place.touches, place.attention.owner)]
    trial = roughened(trial, (p for path in paths for p in trial.get_submodule(path).parameters()))
    known: dict[tuple[Any, ...], list[HeadNumber | None]] = {}
    good: list[Heads] = []
    reasons: dict[str, str] = {}
    for place in places:
        kind = (type(trial.get_submodule(place.attention.owner)), *counts(place.attention, place.units).values())
        why: str | None = None
        for reading in _readings(trial, place, known.get(kind)):
            made = replace(place, attributes=_followed(place, reading))
            failure = _failure(trial, [made], inputs)
            if failure is None:
                known[kind] = list(reading.values())
                good.append(made)
                break
            why = why or failure
        else:
            reasons[place.attention.owner] = f"the code around it takes no other number of heads ({why})"
    together = _failure(trial, good, inputs) if len(good) > 1 else None
    if together is not None:
        reasons |= {place.attention.owner: f"not all attentions can lose heads at once ({together})" for place in good}
        good = []
    return good, reasons


def _followed(place: Heads, reading: Mapping[str, HeadNumber | None]) -> Followed:
    return {(place.attention.owner, name): meaning for name, meaning in reading.items() if meaning is not None}


def _readings(
    model: nn.Module, place: Heads, known: list[HeadNumber | None] | None
) -> Iterator[dict[str, HeadNumber | None]]:
    """What the numbers of the owner may count, the likeliest first."""
    owner = model.get_submodule(place.attention.owner)
    before, after = counts(place.attention, place.units), counts(place.attention, place.units - 1)
    choices: dict[str, list[HeadNumber | None]] = {}
    for name, value in whole_numbers_of(owner).items():
        meanings = [m for m, number in before.items() if number == value]
        distinct: dict[tuple[int, ...], HeadNumber | None] = {}
        for meaning in sorted(meanings, key=lambda m: _unlikely(name, m)):
            numbers = tuple(counts(place.attention, n)[meaning] for n in (1, place.units - 1))
            distinct.setdefault(numbers, meaning if after[meaning] != value or numbers[0] != value else None)
        if any(distinct.values()):
            per_head = value == place.out.total // before[("heads",)] and any(part in name for part in _PER_HEAD)
            options = [None, *distinct.values()] if per_head else [*distinct.values(), None]
            choices[name] = list(dict.fromkeys(options))
    if known is not None and len(known) == len(choices):
        like = zip(choices.items(), known, strict=True)
        yield {name: _same(some, meaning) for (name, some), meaning in like}
    first = {name: some[0] for name, some in choices.items()}
    yield first
    changes = [(name, other) for name, some in choices.items() for other in some[1:]]
    for size in (1, 2, 3):
        for some in itertools.islice(itertools.combinations(changes, size), _MOST):
            if len({name for name, _ in some}) == size:
                yield first | dict(some)


def _same(choices: Sequence[HeadNumber | None], meaning: HeadNumber | None) -> HeadNumber | None:
    """The same meaning among those of another place, whose maps have other paths."""
    kind = None if meaning is None else (meaning[0], meaning[-1].rpartition(".")[2])
    alike = (m for m in choices if m is not None and (m[0], m[-1].rpartition(".")[2]) == kind)
    return next(alike, None)


def _unlikely(name: str, meaning: HeadNumber) -> int:
    """How little a name speaks for a meaning."""
    wide = any(part in name for part in _WIDTHS) and "num" not in name
    if meaning[0] in ("rows", "columns"):
        return 0 if wide else 5
    if "group" in name:
        return {"share": 1, "units": 2}.get(meaning[0], 3)
    if "kv" in name or "key" in name:
        return {"units": 1, "heads": 2}.get(meaning[0], 3)
    return {"heads": 1, "units": 2}.get(meaning[0], 3) + 5 * wide


def _failure(model: nn.Module, places: Sequence[Heads], inputs: Inputs) -> str | None:
    """What shows that the model with fewer heads is not the model with these heads zeroed; None if nothing does."""
    for few in (True, False):
        gone = {place.name: tuple(range(1 if few else place.units - 1)) for place in places}
        if not few and all(place.units == 2 for place in places):
            return None
        with _undone(model, places):
            whole = outputs_of(model, inputs)
            for place in places:
                without_heads(model, place, gone[place.name])
            expected = outputs_of(model, inputs)
            try:
                for place in places:
                    slice_heads(model, place, gone[place.name])
                found = outputs_of(model, inputs)
            except (Exception, LinearizeError) as error:  # whatever the model's own code raises
                return first_line(error)
        why = apart(whole, expected, found)
        if why is not None:
            return why
    return None


@contextmanager
def _undone(model: nn.Module, places: Sequence[Heads]) -> Iterator[None]:
    """Whatever is done to the maps and numbers of some attentions inside is taken back."""
    paths = {path for place in places for path in place.touches}
    layers = {path: model.get_submodule(path) for path in paths}
    owners = {model.get_submodule(place.attention.owner) for place in places}
    held = [(owner, dict(vars(owner))) for owner in owners]
    outs: list[Any] = [model.get_submodule(place.name) for place in places]
    values = [(out.weight, out.weight.detach().clone()) for out in outs]
    try:
        yield
    finally:
        for path, layer in layers.items():
            replace_module(model, path, layer)
        for owner, attributes in held:
            vars(owner).update({name: value for name, value in attributes.items() if name in vars(owner)})
        with torch.no_grad():
            for weight, value in values:
                weight.copy_(value)
