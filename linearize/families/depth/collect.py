"""What data tells about layers: their last branch, and what each of the layers behind adds to it.

Shape letters: B samples, T positions, D features, R rows.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from linearize.families.depth.place import ChainLayer, LayerChain, LayerSums
from linearize.running.passes import Moment
from linearize.running.rows import Wanted, outliers_down, rows_of

__all__ = ["DepthCollector"]


@dataclass
class DepthCollector:
    """Watches the projection of one layer, what it gives, and what some layers behind it give."""

    chain: LayerChain
    index: int
    ahead: int
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    kind: str = field(default="depth", init=False)
    gradients: bool = field(default=False, init=False)
    _m: Tensor | None = field(default=None, init=False)
    _x: dict[int, Tensor] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        self.layer.sums = self.layer.sums or LayerSums(self.layer.shape[-1], self.ahead, self.device)

    @property
    def layer(self) -> ChainLayer:
        """The one whose branch is watched."""
        return self.chain.layers[self.index]

    @property
    def sums(self) -> LayerSums:
        """What was found."""
        if self.layer.sums is None:
            raise ValueError(f"{self.layer.path} has no sums")
        return self.layer.sums

    @property
    def name(self) -> str:
        """Path of the layer."""
        return self.layer.path

    @property
    def memory(self) -> float:
        """The bytes that the sums take."""
        return 8.0 * (self.ahead + 1) * self.layer.shape[-1] ** 2

    def attach(self, now: Moment) -> Iterator[Any]:
        """Watch the projection and the layers."""
        if self.layer.out is None:
            return
        yield now.model.get_submodule(self.layer.out.module).register_forward_hook(self._see_branch)
        for step in range(self.ahead + 1):
            layer = now.model.get_submodule(self.chain.layers[self.index + step].path)
            yield layer.register_forward_hook(self._see_layer(step))

    def _see_branch(self, _: nn.Module, __: Any, output: Tensor) -> None:
        self._m = output.detach()

    def _see_layer(self, step: int) -> Any:
        def see(_: nn.Module, __: Any, output: Any) -> None:
            self._x[step] = (output[0] if isinstance(output, tuple) else output).detach()

        return see

    @torch.no_grad()
    def take(self, now: Moment) -> None:
        """Turn the batch into rows, and forget it."""
        if self._m is None or len(self._x) < self.ahead + 1:
            return
        mask = now.mask(self.name)
        m = rows_of(self._m, 0, mask)
        x = [rows_of(self._x[step], 0, mask) for step in range(self.ahead + 1)]
        images = len(self._m)
        count = Wanted(now.index, self.sums.width).of(images, -(-len(m) // max(1, images))) * images
        chosen = torch.randperm(len(m), generator=now.generator(self.name))[:count].to(m.device)
        weights = outliers_down(x[0])[chosen]
        some = [part[chosen] for part in x]
        changes = torch.stack([after - before for before, after in itertools.pairwise(some)])
        self.sums.update(m[chosen], changes, weights)
        self._m = None
        self._x.clear()

    @property
    def finite(self) -> bool:
        """True: a layer in which something is no number gets no map, and stops nothing else."""
        return True

    def merge(self, other: DepthCollector) -> None:
        """Take in what another one found on other batches."""
        self.sums.merge(other.sums)

    def state(self) -> dict[str, Any]:
        """What was found."""
        return self.sums.state()

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take what `state` gave."""
        self.sums.restore(state)
