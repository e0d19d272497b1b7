"""Options of experts: how many stay, and how many channels each has, with exact costs.

What fewer experts lose is measured: a token whose expert is gone takes another one; if that is gone, too, a third.
What narrower ones lose is predicted, as for channels.

Shape letters: E experts, K that stay, M channels of an expert, m that stay.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from linearize.families.experts.apply import named_tensors
from linearize.families.experts.fit import ExpertCurve, by_change, by_norm, quadratic
from linearize.families.experts.layout import parameters_of
from linearize.families.experts.place import Experts
from linearize.families.experts.twin import without_experts
from linearize.families.option import Group, Option, SiteChoice
from linearize.training.distance import losses_with_all

__all__ = ["EXPERTS", "NARROWER", "channels_gone", "common_options", "experts_groups", "split"]

EXPERTS = "fewer experts"
NARROWER = "narrower experts"
_STEPS = 8  # numbers of experts, and widths, that are offered
_BOTH = 4  # of them, those that are offered together
_HOPELESS = 1.0  # a loss as bad as an output of zeros, or a nat of divergence
_LEAST = 1e-3  # of a predicted loss, which is counted where a few batches show none


def experts_groups(
    model: nn.Module,
    places: Sequence[Experts],
    curves: Mapping[str, ExpertCurve],
    batches: Sequence[Any],
    *,
    round_to: int | None = None,
    progress: bool = False,
) -> list[Group]:
    """A group for each observed mixture.

    Args:
        model: gated.
        places: observed.
        curves: by bank, of those whose channels are known.
        batches: on which losses are measured.
        round_to: widths are multiples of this; None decides for each place.
        progress: show bars.
    """
    tried = {place.bank: _candidates(place) for place in places}
    standing: dict[str, dict[str, nn.Module]] = {}
    for place in places:
        mixture = model.get_submodule(place.path)
        for gone in tried[place.bank]:
            standing[_key(place, gone)] = {place.path: without_experts(mixture, place, gone)}
    losses = losses_with_all(model, standing, batches, progress=progress)
    made = []
    for place in places:
        costs = quadratic(place.sums)
        best: dict[int, tuple[float, tuple[int, ...]]] = {}
        for gone in tried[place.bank]:
            least = float(costs[list(gone)][:, list(gone)].sum().clamp(min=0)) * _LEAST
            loss = max(losses[_key(place, gone)], least)
            if loss < min(_HOPELESS, best.get(len(gone), (math.inf, ()))[0]):
                best[len(gone)] = loss, gone
        made.append(_group(model, place, curves.get(place.bank), list(best.values()), round_to))
    return made


def channels_gone(place: Experts, gone: Sequence[int], keep: Mapping[int, Sequence[int]]) -> tuple[int, ...]:
    """What goes of a mixture, channel by channel: expert * M + channel; all of those of experts that go."""
    width = 0 if place.channels is None else place.channels.width
    lost = [expert * width + channel for expert in gone for channel in range(width)]
    for expert, some in keep.items():
        lost += [expert * width + channel for channel in sorted(set(range(width)) - set(some))]
    return tuple(sorted(lost))


def split(place: Experts, channels: Sequence[int]) -> tuple[tuple[int, ...], dict[int, tuple[int, ...]]] | None:
    """The experts that go, and by expert the channels that stay; None if these are not equally many."""
    width = 0 if place.channels is None else place.channels.width
    lost: dict[int, set[int]] = {expert: set() for expert in range(place.count)}
    for index in channels:
        if width and index // width in lost:
            lost[index // width].add(index % width)
    gone = tuple(expert for expert, some in lost.items() if len(some) == width)
    keep = {e: tuple(c for c in range(width) if c not in some) for e, some in lost.items() if len(some) < width}
    return (gone, keep) if len({len(some) for some in keep.values()}) == 1 else None


def common_options(groups: Sequence[Group], places: Mapping[str, Experts]) -> Group:
    """One group for several mixtures, in which all keep equally many experts of one width."""
    kinds = [{_kind(places, option): option for option in group.options} for group in groups]
    options = []
    for kind in kinds[0]:
        alike = [other[kind] for other in kinds if kind in other]
        if len(alike) == len(kinds):
            choices = tuple(choice for option in alike for choice in option.choices)
            loss, flops, params = (sum(getattr(o, name) for o in alike) for name in ("loss", "flops", "params"))
            options.append(Option(choices, loss, flops, params, 0.0))
    touches = tuple(path for group in groups for path in group.touches)
    reason = "layers have no other number of experts in common" if len(options) < 2 else None
    return Group(tuple(group.sites[0] for group in groups), tuple(options), reason, touches=touches)


def _kind(places: Mapping[str, Experts], option: Option) -> tuple[str, int, int]:
    """What is alike in all layers: the form, how many experts go, and how much stays in all."""
    choice = option.choices[0]
    if not choice.gone:
        return choice.form, 0, 0
    parts = split(places[choice.site], choice.gone) if choice.form == NARROWER else (choice.gone, {})
    return choice.form, len(parts[0]) if parts else 0, choice.keep


def _candidates(place: Experts) -> list[tuple[int, ...]]:
    """Sets of experts that may go: for some numbers, those of two orders."""
    if place.fixed is not None:
        return []
    most = place.count - place.least
    unpicked = int((place.sums.rows == 0).sum())
    step = max(1, most // _STEPS)
    numbers = sorted({*range(step, most + 1, step), most, *([unpicked] if 0 < unpicked <= most else [])})
    orders = [by_change(quadratic(place.sums), most)]
    if not place.listed:  # of experts in a list it is not seen what they give to whom
        orders.append(by_norm(place.sums, most))
    return list(dict.fromkeys(tuple(sorted(order[:number])) for number in numbers for order in orders))


def _key(place: Experts, gone: Sequence[int]) -> str:
    return f"{place.bank} without {','.join(map(str, gone))}"


def _group(
    model: nn.Module,
    place: Experts,
    curve: ExpertCurve | None,
    fewer: Sequence[tuple[float, tuple[int, ...]]],
    round_to: int | None,
) -> Group:
    stay = _option(model, place, SiteChoice(place.name, place.count, form="unchanged"), 0.0, place.count, None)
    options = [stay]
    for loss, gone in fewer:
        count = place.count - len(gone)
        options.append(_option(model, place, SiteChoice(place.name, count, form=EXPERTS, gone=gone), loss, count, None))
    if curve is not None and place.narrow is None:
        some = [*fewer[:: max(1, len(fewer) // _BOTH)]] if fewer else []
        for width in _widths(curve.weights.shape[2], round_to):
            for loss, gone in [(0.0, ()), *some]:
                keep = {expert: curve.keep(expert, width) for expert in place.kept(gone)}
                total = loss + curve.loss(width, gone)
                if total < _HOPELESS:
                    choice = SiteChoice(
                        place.name, len(keep) * width, form=NARROWER, gone=channels_gone(place, gone, keep)
                    )
                    options.append(_option(model, place, choice, total, len(keep), width))
    return Group(
        (place.name,), tuple(options), reason=place.narrow if len(options) < 2 else None, touches=place.touches
    )


def _widths(width: int, round_to: int | None) -> list[int]:
    """Numbers of channels that may stay, falling.

    Grouped products want rows of whole vectors: widths are multiples of 8 unless there are too few channels for that.

    Examples:
        >>> _widths(64, None), _widths(12, None), _widths(24, 16)
        ([56, 48, 40, 32, 24, 16, 8], [8, 4], [16])
    """
    step = round_to or next(step for step in (8, 4, 2, 1) if width >= 2 * step or step == 1)
    shares = {max(step, width * part // _STEPS // step * step) for part in range(1, _STEPS)}
    return sorted((share for share in shares if share < width), reverse=True)


def _option(model: nn.Module, place: Experts, choice: SiteChoice, loss: float, count: int, width: int | None) -> Option:
    """A choice with its costs: of the router, and of the experts; a token uses as many as before."""
    share = 1.0 if width is None or place.channels is None else width / place.channels.width
    router = experts = extra = 0.0
    for path, names in place.rows.items():
        module = model.get_submodule(path)
        for name, value in named_tensors(module, names).items():
            size = value.numel() // place.count if name in module._parameters else 0
            if path != place.bank:
                router += size
            elif place.channels is not None and name in place.channels.slots:
                experts += size * share
            else:
                experts += size if value.dim() == 3 else 0
                extra += size if value.dim() < 3 else 0
    if place.listed:
        expert = next(iter(model.get_submodule(place.bank).children()))
        experts = float(sum(value.numel() for _, value in parameters_of(expert) if value.dim() > 1))
        extra = float(sum(value.numel() for _, value in parameters_of(expert) if value.dim() < 2))
    load = count if place.load == place.count else place.load
    flops = 2.0 * place.tokens * (count * router + load * experts)
    return Option((choice,), loss, flops, count * (router + experts + extra), 0.0)
