"""A chain of layers, each of which reads what the one before it gives, and what a pass over data found between them.

A residual layer gives `x + m` with a branch `m = W h + b`. What the layers behind it add is fitted as a map of m, so
that it can be merged into the projection: `W' = (I + T) W`. Nothing new stands in the model.

Source of the idea: Shopkhoev et al., "ReplaceMe: Network Simplification via Depth Pruning and Transformer Block
Linearization", 2025 (arXiv 2505.02819).

Shape letters: D features, R rows, n layers that are looked ahead.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from linearize.sites.site import Port

__all__ = ["ChainLayer", "LayerChain", "LayerSums"]


@dataclass
class LayerSums:
    """Weighted sums of rows of a branch m, (D,), and of what each of some layers behind adds, (n, D); float64."""

    width: int
    ahead: int
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def __post_init__(self) -> None:
        place = "cpu" if self.device.type == "mps" else self.device
        kind: dict[str, Any] = {"dtype": torch.float64, "device": place}
        self.count, self.weight = 0, 0.0
        self.m = torch.zeros(self.width, **kind)
        self.mm = torch.zeros(self.width, self.width, **kind)
        self.d = torch.zeros(self.ahead, self.width, **kind)
        self.dm = torch.zeros(self.ahead, self.width, self.width, **kind)

    def update(self, m: Tensor, d: Tensor, weights: Tensor) -> None:
        """Take in rows m (R, D) and d (n, R, D), each counted `weights` (R,) times."""
        m, w = m.to(self.m), weights.to(self.m)
        scaled = m * w[:, None]
        self.count += len(m)
        self.weight += float(w.sum())
        self.m += scaled.sum(0)
        self.mm.addmm_(scaled.t(), m)
        for index, change in enumerate(d):
            rows = change.to(self.m)
            self.d[index] += w @ rows
            self.dm[index].addmm_(rows.t(), scaled)

    def merge(self, other: LayerSums) -> None:
        """Take in what others have seen."""
        self.count += other.count
        self.weight += other.weight
        for name in ("m", "mm", "d", "dm"):
            getattr(self, name).add_(getattr(other, name).to(self.m))

    def state(self) -> dict[str, Any]:
        """Everything, as plain values and tensors."""
        return {"count": self.count, "weight": self.weight, "m": self.m, "mm": self.mm, "d": self.d, "dm": self.dm}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take what `state` gave."""
        self.count, self.weight = state["count"], state["weight"]
        for name in ("m", "mm", "d", "dm"):
            setattr(self, name, state[name].to(self.m))


@dataclass
class ChainLayer:
    """One layer of a chain.

    Attributes:
        path: of the module.
        out: the projection whose output it adds last, with nothing behind it; None if there is none.
        keyword: by which it is given its input; "" if by position.
        nones: how many None it gives behind its output.
        rows: True if its output stands in a tuple.
        flops, params: of the module, for the example batch.
        shape: of its input in the example batch.
        sums: of the branch of that projection and of what the layers behind add.
        reason: why it cannot go.
    """

    path: str
    out: Port | None = None
    keyword: str = ""
    nones: int = 0
    rows: bool = False
    flops: float = 0.0
    params: float = 0.0
    shape: tuple[int, ...] = ()
    sums: LayerSums | None = None
    reason: str | None = None


@dataclass
class LayerChain:
    """Layers in the order in which they run, all of one list."""

    layers: list[ChainLayer]

    @property
    def free(self) -> list[int]:
        """Which of them can go."""
        return [index for index, layer in enumerate(self.layers) if layer.reason is None]
