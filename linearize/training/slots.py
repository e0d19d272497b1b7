"""What gates can decide in training: which channels of a site go, and which come back.

Shape letters: C channels of a gate.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

__all__ = ["HandOver", "Slot", "before_any_cut"]

HandOver = Callable[[nn.Module, Tensor, Tensor], None]
"""Writes into a model what changes for those that stay: of channels gone before and afterwards, bool (C,) each."""


@dataclass(frozen=True)
class Slot:
    """Channels of one gate that may go to their line or to zero, and come back.

    Attributes:
        name: of the site.
        counts: how many of them may be gone, rising, the first 0.
        losses: (C,) float64, what the going of each one costs the output, as predicted.
        held: bool (C,), linear channels that do not move, such as those that carry a skip.
        saving: cost that goes with one channel, on the average; above 0.
        hand_over: how the others make up for channels that go, and give it back when they return; None for lines,
            which need nobody.
        touches: names of the parameters that `hand_over` writes.
    """

    name: str
    counts: tuple[int, ...]
    losses: Tensor
    held: Tensor
    saving: float = 1.0
    hand_over: HandOver | None = None
    touches: tuple[str, ...] = ()

    @property
    def channels(self) -> int:
        """C, the number of channels."""
        return len(self.losses)

    @property
    def most(self) -> int:
        """How many may be gone."""
        return self.counts[-1]


def before_any_cut(slots: Mapping[str, Slot], gone: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Where each channel stands in the order of going, before training has said anything: (C,) in [0, 1] by name.

    A channel stands the higher, the less loss goes with the cost that it saves, over all slots. Those that are gone
    already stand in the upper half and all others in the lower one, if some are gone anywhere.

    Examples:
        >>> none = torch.zeros(2, dtype=torch.bool)
        >>> slot = Slot("act", (0, 1), torch.tensor([3.0, 1.0]), none)
        >>> before_any_cut({"act": slot}, {"act": none})["act"].tolist()
        [0.5, 1.0]
    """
    ratios = {name: (slot.losses / slot.saving).masked_fill(slot.held, torch.inf) for name, slot in slots.items()}
    every = torch.cat(list(ratios.values())).sort().values
    places = {name: 1 - torch.searchsorted(every, ratio).double() / len(every) for name, ratio in ratios.items()}
    if not any(bool(mask.any()) for mask in gone.values()):
        return places
    return {name: (place + gone[name].double()) / 2 for name, place in places.items()}
