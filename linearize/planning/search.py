"""A short search around a plan with the real loss: predicted losses are taken as additive, and are not quite.

Each trial scales the predicted losses of the groups by random factors, chooses anew within the same budget, and
measures the distance of the model's output to the original's on some batches. The best choice stays.

Source of the idea: Frantar and Alistarh, "SPDY: Accurate Pruning with Speedup Guarantees", ICML 2022.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch

from linearize.planning.choose import Choice, choose
from linearize.planning.distance import real_loss, some_of
from linearize.planning.settle import edited, site_choices
from linearize.planning.survey import Survey

__all__ = ["searched", "unscaled"]

_SPREAD = 0.5  # of the logarithm of the factors


def searched(
    found: Survey,
    budget: float,
    data: Iterable[Any],
    *,
    trials: int,
    batches: int = 4,
    seed: int = 0,
    say: Callable[[str], None] = lambda _: None,
) -> Survey:
    """The survey, with losses so scaled that the choice within a budget is the best of some by the real loss.

    Args:
        found: the survey; its own choice is the one to start from.
        budget: cost that the groups may have in all.
        data: re-iterable batches; some spread over all of it are used.
        trials: choices to try.
        batches: number of batches to measure on.
        seed: of the factors.
        say: told what is going on.
    """
    generator = torch.Generator().manual_seed(seed)
    some = some_of(data, batches)
    first, best = choose(found.groups, found.measure, budget), found
    least = real_loss(found.gated, edited(found, site_choices(first)), some)
    say(f"  search: {least:.4g} at the start")
    seen = {tuple(first.options)}
    factors = torch.zeros(len(found.groups), dtype=torch.float64)
    for trial in range(trials):
        step = torch.randn(len(found.groups), generator=generator, dtype=torch.float64) * _SPREAD
        scales = (factors + step).exp().tolist()
        scaled = [
            replace(g, options=tuple(replace(o, loss=o.loss * s) for o in g.options))
            for g, s in zip(found.groups, scales, strict=True)
        ]
        picked = choose(scaled, found.measure, budget)
        choice = unscaled(picked, found)
        if tuple(choice.options) in seen:
            continue
        seen.add(tuple(choice.options))
        loss = real_loss(found.gated, edited(found, site_choices(choice)), some)
        if loss < least:
            say(f"  search: {loss:.4g} in trial {trial + 1}")
            best, least, factors = replace(found, groups=scaled), loss, factors + step
    return best


def unscaled(picked: Choice, found: Survey) -> Choice:
    """The same options with the losses that were predicted for them."""
    known = {option.choices: option for group in found.groups for option in (*group.options, group.gone)}
    options = tuple(known[option.choices] for option in picked.options)
    return replace(picked, options=options, loss=sum(option.loss for option in options))
