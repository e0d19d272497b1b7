"""An attention whose heads may go, as plain data, and what a pass over data found about it.

Shape letters: H query heads, U units, g features of a unit, F = U * g inputs of the output projection, O its outputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor

from linearize.families.gathered import Gathered
from linearize.graph.attention import Attention
from linearize.sites.site import Port

__all__ = ["HeadNumber", "Heads", "counts"]

HeadNumber = tuple[str, ...]
"""What a number that a forward reads counts: ("heads",), ("units",), ("share",), ("columns",), or ("rows", MODULE)."""


def counts(attention: Attention, units: int) -> dict[HeadNumber, int]:
    """The numbers around an attention of which so many units are left.

    Examples:
        >>> from linearize.graph.attention import Rows
        >>> port = Port("q", "linear", 0, 4, 4, False, 1)
        >>> two = Attention("attn", (Rows(port, ((0, 1), (2, 3))),), port, ((0, 1), (2, 3)), ((0,), (1,)))
        >>> counts(two, 1)
        {('heads',): 1, ('units',): 1, ('share',): 1, ('columns',): 2, ('rows', 'q'): 2}
    """
    each, width = len(attention.units[0]), len(attention.columns[0])
    heads, before = units * each, len(attention.units)
    shared = any(rows.shared for rows in attention.rows)
    found: dict[HeadNumber, int] = {("heads",): heads}
    found[("units",)] = 1 if shared else units
    found[("share",)] = heads if shared else each
    found[("columns",)] = heads * width
    for rows in attention.rows:
        named = {feature for some in rows.by_head for feature in some}
        left = rows.port.total - (0 if rows.shared else len(named) * (before - units) // before)
        found[("rows", rows.port.module)] = left
    return found


@dataclass
class Heads(Gathered):
    """An attention of which heads may go.

    Attributes:
        attention: as it was found in the graph.
        attributes: numbers that forwards read, by path of the module and name, and what they count; those in a list
            with their place behind a dot.
        batch: how many times the captured batch the whole one is.
        cached: whether keys and values are kept from call to call.
        seen: samples of data.
        rows, sensitivity, samples: the covariance of the heads side by side, as the projection reads them, and how much
            the projection's output matters (`Gathered`).
    """

    attention: Attention
    attributes: Mapping[tuple[str, str], HeadNumber] = field(default_factory=dict)
    batch: float = 1.0
    cached: bool = False
    seen: int = 0

    @property
    def out(self) -> Port:
        """The output projection."""
        port = self.attention.out
        if port is None:
            raise ValueError(f"{self.attention.owner} was not found to have heads")
        return port

    @property
    def name(self) -> str:
        """Path of the output projection: an attention has one, and it stands for nothing else."""
        return self.out.module

    @property
    def units(self) -> int:
        """The number of units, U."""
        return len(self.attention.units)

    @property
    def group(self) -> int:
        """The number of features of a unit, g."""
        return self.out.total // self.units

    @property
    def touches(self) -> tuple[str, ...]:
        """Paths of the maps that change."""
        return (*dict.fromkeys(rows.port.module for rows in self.attention.rows), self.out.module)

    def columns(self, units: Sequence[int]) -> Tensor:
        """Inputs of the projection, unit by unit."""
        chosen = [head for unit in units for head in self.attention.units[unit]]
        return torch.tensor([c for head in chosen for c in self.attention.columns[head]], dtype=torch.long)

    def left(self, module: str, gone: Sequence[int]) -> Tensor:
        """Outputs of a map before the attention that stay when some units go, ascending."""
        heads = {head for unit in gone for head in self.attention.units[unit]}
        total, lost = 0, set[int]()
        for rows in self.attention.rows:
            if rows.port.module == module:
                total = rows.port.total
                if not rows.shared:
                    lost |= {feature for head in heads for feature in rows.by_head[head]}
        return torch.tensor([row for row in range(total) if row not in lost], dtype=torch.long)

    def state(self) -> dict[str, Any]:
        """What the pass found, as plain values and tensors; `restore` takes it back."""
        return {**super().state(), "seen": self.seen}

    def restore(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Take what `state` gave."""
        super().restore(state, device)
        self.seen = state["seen"]

    def merge(self, other: Self) -> None:
        """Take in what was found on other batches."""
        super().merge(other)
        self.seen += other.seen
