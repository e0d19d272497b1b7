"""Whether the code around experts takes fewer of them, and narrower ones: tried on copies with rough weights.

Experts are masked in a copy, which runs; then they are sliced away, and it runs again. What comes out must be the same.
Likewise channels that are multiplied by zero. Weights are random and large, so that no mistake hides behind a small
one. Numbers that could count experts, and places where channels could stand, are told by their values; where these are
ambiguous, one reading after the other is tried.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from linearize.errors import CollapseError, LinearizeError
from linearize.families.experts.apply import named_tensors, slice_channels, slice_experts, zero_channels
from linearize.families.experts.hidden import Bank
from linearize.families.experts.layout import axis_of, channels_of, numbers_for, parameters_of, widths_for
from linearize.families.experts.mask import Unpicked
from linearize.families.experts.place import Experts
from linearize.families.experts.twin import borrowed, call_argument
from linearize.families.trials import TOLERANCE, apart, outputs_of, roughened
from linearize.graph.capture import Inputs
from linearize.graph.dryrun import first_line
from linearize.graph.protect import untouched
from linearize.running.copies import duplicate
from linearize.running.models import evaluating

__all__ = ["carried"]

_MOST = 24  # readings of channels that are tried
_MEMORY = 16e9  # bytes of statistics of the channels of one bank
_ROWS = 64  # on which experts are looked at by themselves


def carried(model: nn.Module, places: Sequence[Experts], inputs: Inputs) -> tuple[list[Experts], dict[str, str], bool]:
    """The places where anything can go, told what follows; by bank, why experts stay; whether as many must everywhere.

    Args:
        model: gated; it is left as it was.
        places: found in it.
        inputs: on which it runs.
    """
    if not places:
        return [], {}, False
    trial = duplicate(model, CollapseError)
    trial = roughened(trial, (p for place in places for _, p in parameters_of(trial.get_submodule(place.path))))
    free = [place for place in places if place.fixed is None]
    made, equal = _together(trial, free, inputs) if free else ([], False)
    if free and not made:
        made, equal = [_alone(trial, place, inputs) for place in free], True
        good = [place for place in made if place.fixed is None]
        why = _fewer(trial, good, inputs, equal=True) if len(good) > 1 else None
        if why is not None:
            why = f"not all mixtures can lose experts at once ({why})"
            made = [replace(place, fixed=place.fixed or why, attributes={}) for place in made]
    known = {place.bank: place for place in made}
    whole = [known.get(place.bank, place) for place in places]
    whole = [place if place.listed else _with_channels(trial, place, inputs) for place in whole]
    reasons = {place.bank: place.fixed for place in whole if place.fixed is not None}
    return [p for p in whole if p.fixed is None or not (p.listed or p.narrow)], reasons, equal


def _together(trial: nn.Module, places: Sequence[Experts], inputs: Inputs) -> tuple[list[Experts], bool]:
    """All places by the first reading that holds for all at once; whether they must keep equal numbers."""
    readings = [list(numbers_for(trial, place)) for place in places]
    for number in range(min(map(len, readings))):
        made = [replace(place, attributes=some[number]) for place, some in zip(places, readings, strict=True)]
        for equal in (False, True):
            if _fewer(trial, made, inputs, equal=equal) is None:
                return made, equal
    return [], True


def _alone(trial: nn.Module, place: Experts, inputs: Inputs) -> Experts:
    """A place by the first reading that holds for it; or told why none does."""
    why: str | None = None
    for reading in numbers_for(trial, place):
        made = replace(place, attributes=reading)
        failure = _fewer(trial, [made], inputs, equal=True)
        if failure is None:
            return made
        why = why or failure
    return replace(place, fixed=f"the code around it takes no fewer experts ({why})", attributes={})


def _some(place: Experts, *, more: bool) -> tuple[int, ...]:
    """Which experts go in a trial: about half of them, or one more."""
    most = place.count - place.least
    count = min(most, max(1, place.count // 2) + more)
    return tuple(range(0, place.count, 2))[:count] if 2 * count <= place.count + 1 else tuple(range(count))


def _fewer(trial: nn.Module, places: Sequence[Experts], inputs: Inputs, *, equal: bool) -> str | None:
    """What shows that the model with fewer experts is not the model that never picks them; None if nothing does."""
    gone = [_some(place, more=not equal and index % 2 == 1) for index, place in enumerate(places)]
    whole = outputs_of(trial, inputs)
    sliced = borrowed(trial)
    try:
        for place, some in zip(places, gone, strict=True):
            slice_experts(sliced, place, some)
        found = outputs_of(sliced, inputs)
    except (Exception, LinearizeError) as error:  # whatever the model's own code raises
        return first_line(error)
    why: str | None = None
    for biases in (False, True):  # a bias that chooses behind the logits has to be masked by itself
        masked = borrowed(trial)
        routers = [
            pair for place, some in zip(places, gone, strict=True) for pair in _masked(masked, place, some, biases)
        ]
        failure = apart(whole, outputs_of(masked, inputs, Unpicked(routers)), found)
        if failure is None:
            return None
        why = why or failure
    return why


def _masked(
    model: nn.Module,
    place: Experts,
    gone: tuple[int, ...],
    biases: bool,  # noqa: FBT001 - private
) -> Iterable[tuple[Tensor, tuple[int, ...]]]:
    """The matrices of a router, and what is to be masked of them; with its biases masked in place, if asked for."""
    for path, names in place.rows.items():
        module = model.get_submodule(path)
        for name, value in named_tensors(module, names).items() if path != place.bank else ():
            axis = axis_of(value, place.count) or 0
            if value.numel() > place.count:
                yield getattr(module, name), gone
            elif biases and value.is_floating_point():
                changed = value.index_fill(axis, torch.tensor(gone, device=value.device), float("-inf"))
                if name in module._parameters:
                    module._parameters[name] = nn.Parameter(changed)
                else:
                    module._buffers[name] = changed


def _with_channels(trial: nn.Module, place: Experts, inputs: Inputs) -> Experts:
    """The place, told where the channels of its experts stand; or why they cannot become fewer."""
    rows = _rows_of(trial, place, inputs)
    bank = trial.get_submodule(place.bank)
    why = "which of its tensors hold their channels is not to be seen"
    for channels in itertools.islice(channels_of(bank, 0 if rows is None else rows[0].shape[1]), _MOST):
        made = replace(place, channels=channels, attributes={**place.attributes, **widths_for(trial, place, channels)})
        size = 8.0 * place.count * channels.width**2
        if size > _MEMORY:
            return replace(place, narrow=f"statistics of its channels would take {size / 1e9:.0f} GB")
        failure = "it has a single channel" if channels.width < 2 else _narrower(trial, made, inputs, rows)
        if failure is None:
            return made
        why = failure
    return replace(place, narrow=why)


def _narrower(trial: nn.Module, place: Experts, inputs: Inputs, rows: tuple[Tensor, Tensor] | None) -> str | None:
    """What shows that narrower experts are not experts with zeroed channels; None if nothing does."""
    channels = place.channels
    if channels is None or rows is None:
        return "nothing reaches them"
    generator = torch.Generator().manual_seed(0)
    half = channels.width // 2
    stay = next(half // step * step for step in (8, 4, 2, 1) if half >= step)  # grouped products want whole vectors
    keep = torch.rand(place.count, channels.width, generator=generator).argsort(1)[:, :stay].sort(1).values
    try:
        off = _misread(trial, place, rows)
        if not off <= TOLERANCE:
            return f"what they give is not their last matrix times their channels (off by {off:.2g})"
        whole = outputs_of(trial, inputs)
        zeroed = borrowed(trial)
        bank = zeroed.get_submodule(place.bank)
        bank._parameters[channels.down] = nn.Parameter(bank.get_parameter(channels.down).detach().clone())
        zero_channels(zeroed, place, keep)
        sliced = borrowed(trial)
        slice_channels(sliced, place, keep)
        return apart(whole, outputs_of(zeroed, inputs), outputs_of(sliced, inputs))
    except (Exception, LinearizeError) as error:
        return first_line(error)


def _misread(trial: nn.Module, place: Experts, rows: tuple[Tensor, Tensor]) -> float:
    if place.channels is None:
        return 1.0
    with evaluating(trial), untouched(trial):
        return Bank(trial.get_submodule(place.bank), place).misread(*rows, place.channels)


def _rows_of(model: nn.Module, place: Experts, inputs: Inputs) -> tuple[Tensor, Tensor] | None:
    """Some tokens that reach a bank, and an expert that each picks."""
    seen: list[tuple[Tensor, Tensor]] = []

    def see(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x, index = (call_argument(args, kwargs, key) for key in place.given[:2])
        seen.append((x[:_ROWS].detach(), index[:_ROWS, 0].detach()))

    handle = model.get_submodule(place.bank).register_forward_pre_hook(see, with_kwargs=True)
    try:
        outputs_of(model, inputs)
    finally:
        handle.remove()
    return seen[0] if seen else None
