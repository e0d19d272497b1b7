"""A mixture of experts as plain data, and what a pass over data found about it.

Shape letters: E experts, k that each token picks, M channels of an expert, D features of a token, O of what comes out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, Literal

import torch
from torch import Tensor

__all__ = ["ArgumentKey", "ExpertChannels", "ExpertNumber", "Experts", "Slots"]

ArgumentKey = int | str
"""Which argument of a call: its position, or its name."""
ExpertNumber = Literal["experts", "width"]
"""What a number that a forward reads counts."""


@dataclass(frozen=True)
class Slots:
    """Where the channels of each expert stand in a tensor that holds all experts: `[expert, ...]`.

    Attributes:
        axis: of the tensor.
        parts: how often each channel stands there: twice where a gate and what it multiplies are one matrix.
        woven: True if the entries of a channel stand side by side; else the parts follow each other.
    """

    axis: int
    parts: int = 1
    woven: bool = False

    def entries(self, channels: Tensor, width: int) -> Tensor:
        """Entries (..., parts * m) of channels (..., m), ascending with the channels in each part.

        Examples:
            >>> some = torch.tensor([[0, 2]])
            >>> Slots(1, 2).entries(some, 3).tolist(), Slots(1, 2, woven=True).entries(some, 3).tolist()
            ([[0, 2, 3, 5]], [[0, 1, 4, 5]])
        """
        part = torch.arange(self.parts, device=channels.device)
        if self.woven:
            return (channels[..., None] * self.parts + part).flatten(-2)
        return (channels[..., None, :] + part[:, None] * width).flatten(-2)


@dataclass(frozen=True)
class ExpertChannels:
    """The channels of all experts of a bank.

    Attributes:
        width: M.
        slots: by name of a tensor of the bank, where they stand.
        down: the tensor that reads them, whose other axis is O.
        bias: what is added behind it, (E, O); "" if there is nothing.
    """

    width: int
    slots: Mapping[str, Slots]
    down: str
    bias: str = ""


@dataclass
class Experts:
    """A mixture of experts.

    Attributes:
        path: of the smallest module around the router and the experts, which maps each token by itself.
        bank: path of the module whose parameters hold all experts, or of the list of experts.
        router: path of the module with a row for each expert.
        count: E.
        picks: k; of a list, the least number of experts with which it runs.
        load: through how many experts a token goes on the average: k, or E where all are computed.
        listed: True for a list of modules.
        rows: by path of a module, its tensors that have a row for each expert.
        given: the arguments by which the bank gets tokens, the numbers of experts, and their weights.
        keyword: by which the mixture gets its tokens; "" by position.
        shape: of the tokens in the example batch.
        attributes: numbers that forwards read, by path of the module and name, and what they count.
        channels: of the experts; None if they are not known.
        closed: True if tokens that do not pick an expert do not notice that it goes.
        fixed: why no expert can go; None if some can.
        narrow: why the experts cannot be narrower; None if they can.
        sums: what the pass found.
    """

    path: str
    bank: str
    router: str
    count: int
    picks: int = 0
    load: float = 0.0
    listed: bool = False
    rows: Mapping[str, Sequence[str]] = field(default_factory=dict)
    given: tuple[ArgumentKey, ArgumentKey, ArgumentKey] = (0, 1, 2)
    keyword: str = ""
    shape: tuple[int, ...] = ()
    attributes: Mapping[tuple[str, str], ExpertNumber] = field(default_factory=dict)
    channels: ExpertChannels | None = None
    closed: bool = True
    fixed: str | None = None
    narrow: str | None = None
    sums: Any = None

    @property
    def name(self) -> str:
        """Path of the bank: every mixture has one of its own."""
        return self.bank

    @property
    def least(self) -> int:
        """How many experts must stay: as many as a token picks."""
        return max(1, self.picks)

    @property
    def tokens(self) -> int:
        """Number of tokens in the example batch."""
        return int(torch.Size(self.shape[:-1]).numel())

    @property
    def touches(self) -> tuple[str, ...]:
        """Paths of the modules that change."""
        return tuple(dict.fromkeys(chain((self.bank,), self.rows)))

    def kept(self, gone: Sequence[int]) -> list[int]:
        """The experts that stay, ascending."""
        lost = set(gone)
        return [expert for expert in range(self.count) if expert not in lost]
