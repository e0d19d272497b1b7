"""Equal widths: the same share of channels stays in every layer, and the layers that read them are refitted.

Also the controls: the same widths trained from random weights, and the original trained on.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.peers.hidden import Hidden, channels_of, cut
from benchmarks.peers.refit import consumed, refit, removal, sizes, weight_of
from benchmarks.peers.subject import Candidate, Subject

__all__ = ["by_removal", "by_width", "from_scratch", "no_cut"]

_LEVELS = 64


def by_width(subject: Subject, budgets: Sequence[float]) -> list[Candidate]:
    """In every stretch the channels of largest norm of producer's row times consumer's column, consumers refitted.

    Least squares on the calibration data, as in He et al., "Channel Pruning for Accelerating Very Deep Neural
    Networks", ICCV 2017; the choice of channels is by weights alone.
    """
    return _equal(subject, budgets, lambda hidden, _: sizes(subject.model, hidden))


def by_removal(subject: Subject, budgets: Sequence[float]) -> list[Candidate]:
    """The same, but channels go by the least error that their removal leaves after refitting, one after the other.

    Optimal brain surgeon on channels, greedy (Hassibi and Stork, NeurIPS 1992), every output weighted alike.
    """
    return _equal(subject, budgets, lambda hidden, moments: removal(weight_of(subject.model, hidden), *moments))


def from_scratch(fresh: Callable[[], nn.Module], redraw: Callable[[nn.Module], object], steps: int) -> Any:
    """The control: `by_width`'s shapes with random weights.

    Args:
        fresh: makes the whole network anew, from another seed.
        redraw: draws the weights of a narrowed one again, where their scale depends on the width.
        steps: of training, with the task's loss.
    """

    def method(subject: Subject, budgets: Sequence[float]) -> list[Candidate]:
        found = []
        for budget in budgets:
            model, level, reached = _fitting(subject, budget)
            model = fresh()
            for hidden in subject.hidden:
                cut(model, hidden, torch.arange(_kept(channels_of(model, hidden), level)))
            redraw(model)
            told = {"width": level / _LEVELS}
            found.append(Candidate(budget, model, reached, reached <= budget, scratch=steps, told=told))
        return found

    return method


def no_cut(subject: Subject, budgets: Sequence[float]) -> list[Candidate]:
    """The control: the original itself, fine-tuned like all others; it stands under the largest budget."""
    return [Candidate(budgets[0], subject.model, 1.0, budgets[0] >= 1)]


def _equal(
    subject: Subject, budgets: Sequence[float], rank: Callable[[Hidden, tuple[Tensor, Tensor]], Tensor]
) -> list[Candidate]:
    moments = consumed(subject)
    ranks = [rank(hidden, pair) for hidden, pair in zip(subject.hidden, moments, strict=True)]
    found = []
    for budget in budgets:
        _, level, reached = _fitting(subject, budget)
        model = copy.deepcopy(subject.model)
        for hidden, pair, order in zip(subject.hidden, moments, ranks, strict=True):
            keep = order.topk(_kept(len(order), level)).indices.sort().values
            refit(model, hidden, keep, *pair)
        told = {"width": level / _LEVELS}
        found.append(Candidate(budget, model, reached, reached <= budget, told=told))
    return found


def _kept(channels: int, level: int) -> int:
    return max(1, round(channels * level / _LEVELS))


def _fitting(subject: Subject, budget: float) -> tuple[nn.Module, int, float]:
    """The widest level whose FLOPs are within the budget; the narrowest if none is."""

    def at(level: int) -> tuple[nn.Module, float]:
        model = copy.deepcopy(subject.model)
        for hidden in subject.hidden:
            cut(model, hidden, torch.arange(_kept(channels_of(model, hidden), level)))
        return model, subject.share(model)

    low, high = 1, _LEVELS
    while low < high:
        middle = (low + high + 1) // 2
        if at(middle)[1] <= budget:
            low = middle
        else:
            high = middle - 1
    model, reached = at(low)
    return model, low, reached
