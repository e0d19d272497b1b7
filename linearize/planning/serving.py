"""Prices of options for a model that is served: bytes of weights and cache, and shares of the times of its steps.

Bytes are counted. Times are measured: the share that the present layers of a group take, inside the model and with its
real cache, times the ratio of an option's layers to the present ones, in the shapes of such a step.

Shape letters: B batch of the example and T its tokens; b batch and t tokens of a step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from torch import nn

from linearize.families.option import Group
from linearize.planning.timing.all import batch_size, parts_of, priced
from linearize.planning.timing.in_place import shares_of
from linearize.planning.timing.shown import Shown
from linearize.running.models import evaluating
from linearize.serving.decoder import Decoder
from linearize.serving.memory import Memory, weight_bytes
from linearize.serving.point import Point, size_of
from linearize.serving.turns import decode_in_turns
from linearize.zoo.caches import keepers

__all__ = ["with_memory", "with_steps"]


def with_memory(model: nn.Module, groups: Sequence[Group], whole: Memory) -> list[Group]:
    """The groups with the bytes of the weights and the cache that each option leaves.

    Args:
        model: gated.
        groups: with options.
        whole: of the original. The cache of a layer belongs to the heads inside it; where there are none to choose
            from, to the smallest group around it.
    """
    each = weight_bytes(model) / max(1, sum(tensor.numel() for tensor in (*model.parameters(), *model.buffers())))
    caches: dict[int, float] = {}  # by position of a group, what its present option keeps
    for path, number in keepers(model).items():
        if number >= len(whole.layers):
            continue
        inside = [i for i, g in enumerate(groups) if g.stay.cache and all(t.startswith(f"{path}.") for t in g.touches)]
        around = [i for i, g in enumerate(groups) if g.encloses and f"{path}.".startswith(f"{g.sites[0]}.")]
        owner = inside[:1] or sorted(around, key=lambda i: -len(groups[i].sites[0]))[:1]
        for index in owner:
            caches[index] = caches.get(index, 0.0) + whole.layers[number]
    found = []
    for index, group in enumerate(groups):
        kept, stay = caches.get(index, 0.0), group.stay
        options = []
        for option in group.options:
            share = option.cache / stay.cache if stay.cache else float(option is stay)
            options.append(replace(option, memory=option.params * each + kept * share))
        found.append(replace(group, options=tuple(options)))
    return found


def with_steps(
    kind: Literal["decode", "prefill"],
    original: nn.Module,
    gated: nn.Module,
    groups: Sequence[Group],
    shown: Shown,
    batch: Any,
    point: Point,
    *,
    flops: float,
    rounds: int,
    cache: Path | None,
) -> list[Group]:
    """The groups with shares of the time of a step, for each option.

    Args:
        kind: a token that is decoded, or all of the prompt.
        original: the model as it came.
        gated: the same, converted.
        groups: with options.
        shown: the layers of each option of a group.
        batch: the example, in which the shapes of the groups were seen.
        point: batch size and context of the step.
        flops: of the original, for the example.
        rounds: measurements of each.
        cache: file of ratios; None remembers none.
    """
    with evaluating(original):
        decoder = Decoder(original, point)

        def fresh() -> Callable[[], Any]:
            if kind == "prefill":
                return decoder.prefill
            kept = decoder.fresh()
            return lambda: decoder.step(kept, 0)

        shares = shares_of(original, {point.batch: fresh}, parts_of(gated, groups), rounds=rounds)
        seconds = decode_in_turns({"original": original}, point, rounds=3)["original"].of(kind)
    old, tokens = size_of(batch), 1 if kind == "decode" else decoder.prompt.shape[1]
    shaped = [replace(group, shape=_shape(group.shape, old, tokens)) for group in groups]
    whole = {point.batch: sorted(seconds)[len(seconds) // 2]}
    size = batch_size(batch)
    timed = priced(original, gated, shaped, shown, shares, whole, size=size, flops=flops, rounds=rounds, cache=cache)
    by_place = {(group.sites, group.encloses): group for group in timed}
    return [_noted(group, by_place[group.sites, group.encloses], kind) for group in groups]


def _noted(group: Group, timed: Group, kind: str) -> Group:
    """A group with what was measured for another step than the example."""
    shares: list[Mapping[str, Any]] = [{kind: option.cost("latency")} for option in timed.options]
    return replace(group, options=tuple(replace(o, **share) for o, share in zip(group.options, shares, strict=True)))


def _shape(shape: tuple[int, ...], old: tuple[int, int], tokens: int) -> tuple[int, ...]:
    """The shape of an input in a step of so many tokens; () if nobody can tell.

    Examples:
        >>> _shape((2, 16, 32), (2, 16), 1), _shape((32, 8), (2, 16), 1), _shape((2, 49, 8), (2, 16), 1)
        ((2, 1, 32), (2, 8), ())
    """
    if len(shape) > 2 and shape[:2] == old:
        return (shape[0], tokens, *shape[2:])
    if len(shape) == 2 and shape[0] == old[0] * old[1]:
        return (old[0] * tokens, shape[1])
    return ()
