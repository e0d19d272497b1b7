"""Who goes, of all channels that may, so that a price is met: those of the best score.

Shape letters: C channels of a gate.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from linearize.training.slots import Slot

__all__ = ["PriceOf", "chosen"]

PriceOf = Callable[[Mapping[str, int]], float]
"""The share of a cost that is left, for the numbers of channels that are gone, by slot."""


def chosen(
    slots: Mapping[str, Slot], scores: Mapping[str, Tensor], price: PriceOf, share: float, *, fill: bool = True
) -> dict[str, Tensor]:
    """Select the channels to remove: the best score first, until the price is at most `share`.

    Each slot allows certain numbers only.

    Channels between two such numbers go together, at their mean score. With `fill`, what the last of them saved too
    much is given back, to those of the lowest score for which it is enough. If nothing reaches the share, all that may
    go.

    Examples:
        >>> slot = Slot("act", (0, 2, 3), torch.zeros(4), torch.zeros(4, dtype=torch.bool))
        >>> scores = {"act": torch.tensor([4.0, 1.0, 2.0, 3.0])}
        >>> chosen({"act": slot}, scores, lambda gone: 1 - gone["act"] / 4, 0.5)["act"].tolist()
        [True, False, False, True]
    """
    blocks: list[tuple[float, int, str]] = []
    orders: dict[str, Tensor] = {}
    for name, slot in slots.items():
        score = scores[name].masked_fill(slot.held, -torch.inf)
        orders[name] = torch.argsort(score, descending=True, stable=True)
        ordered = score[orders[name]].tolist()
        for low, high in zip(slot.counts, slot.counts[1:], strict=False):
            blocks.append((sum(ordered[low:high]) / (high - low), high, name))
    blocks.sort(key=lambda block: -block[0])  # stable: equal scores in the order of execution

    def after(number: int) -> dict[str, int]:
        return dict.fromkeys(slots, 0) | {name: high for _, high, name in blocks[:number]}

    low, high = 0, len(blocks)
    while low < high:
        middle = (low + high) // 2
        if price(after(middle)) <= share * (1 + 1e-12):
            high = middle
        else:
            low = middle + 1
    counts = _filled(after(low), blocks[:low], price, share) if fill else after(low)
    gone = {name: torch.zeros(slot.channels, dtype=torch.bool) for name, slot in slots.items()}
    for name, count in counts.items():
        gone[name][orders[name][:count]] = True
    return gone


def _filled(
    counts: dict[str, int], taken: list[tuple[float, int, str]], price: PriceOf, share: float
) -> dict[str, int]:
    """The same numbers, with whole blocks given back as long as the price stays within the share."""
    below = {(high, name): low for (_, high, name), low in zip(taken, _lows(taken), strict=True)}
    while True:
        last = [(score, high, name) for score, high, name in taken if counts[name] == high]
        for _, high, name in sorted(last, key=lambda block: block[0]):
            fewer = counts | {name: below[high, name]}
            if price(fewer) <= share * (1 + 1e-12):
                counts = fewer
                break
        else:
            return counts


def _lows(taken: list[tuple[float, int, str]]) -> list[int]:
    """How many of its slot were gone before each block."""
    found, counts = [], dict[str, int]()
    for _, high, name in taken:
        found.append(counts.get(name, 0))
        counts[name] = high
    return found
