"""Statistics of blocks: covariances of (patches of the input, output), and the sensitivity to an error in the output.

Shape letters: I inputs and O outputs of the block, k kernel, R rows (positions).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from linearize.algebra.affine import pad_same
from linearize.algebra.covariance import Covariance
from linearize.families.blocks.find import Block
from linearize.running.passes import Moment
from linearize.running.rows import Wanted, batched

__all__ = ["BlockCollector"]


@dataclass
class BlockCollector:
    """Watches the first and the last map of a block, and adds the statistics to the block."""

    block: Block
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    kind: str = field(default="block", init=False)
    gradients: bool = field(default=True, init=False)
    _seen: dict[str, Tensor] = field(default_factory=dict, init=False)

    @property
    def name(self) -> str:
        """The name of the block."""
        return self.block.name

    @property
    def memory(self) -> float:
        """Bytes that the sums take."""
        return sum(8.0 * self._features(kernel) ** 2 for kernel in self.block.kernels)

    def _features(self, kernel: int) -> int:
        return (self.block.inputs + 1) * kernel * kernel + self.block.outputs

    def attach(self, now: Moment) -> Iterator[Any]:
        """Watch the input of the first map, and the output of the last."""
        yield now.model.get_submodule(self.block.first.module).register_forward_pre_hook(self._begin)

        def end(_: nn.Module, __: Any, output: Tensor) -> Tensor:
            self._seen["y"] = batched(output.detach(), 2)
            output = output + now.source.to(output.dtype)
            if output.requires_grad:
                output.register_hook(lambda gradient: self._seen.__setitem__("g", batched(gradient.detach(), 2)))
            return output

        yield now.model.get_submodule(self.block.last.module).register_forward_hook(end)

    def _begin(self, _: nn.Module, inputs: tuple[Any, ...]) -> None:
        self._seen["x"] = batched(inputs[0].detach(), 2)

    @torch.no_grad()
    def take(self, now: Moment) -> None:
        """Turn the batch into rows, add them to the sums, and release the batch."""
        seen, block = dict(self._seen), self.block
        self._seen.clear()
        if "x" not in seen or "y" not in seen:
            return
        x, y = seen["x"], seen["y"]
        block.shape = block.shape or tuple(x.shape)
        positions = math.prod(y.shape[2:])
        widest = max((self._features(kernel) for kernel in block.kernels), default=1)
        count = Wanted(now.index, widest).of(len(y), positions)
        place = torch.randperm(positions, generator=now.generator(self.name))[:count].to(x.device)
        target = y.flatten(2)[:, :, place].transpose(1, 2).flatten(0, 1)
        for kernel in block.kernels:
            parts = [_patches(block, some, kernel, tuple(y.shape[2:]), place) for some in x.split(8)]
            if kernel in block.misfits or any(part is None for part in parts):
                block.misfits.add(kernel)
                block.rows.pop(kernel, None)
                continue
            features = torch.cat([part for part in parts if part is not None])
            if kernel not in block.rows:
                block.rows[kernel] = Covariance(self._features(kernel), x.device)
            block.rows[kernel].update(torch.cat((features, target.to(features)), 1))
        if "g" in seen:
            g = seen["g"].transpose(0, 1).flatten(1).double()
            total = g @ g.t()
            block.sensitivity = total if block.sensitivity is None else block.sensitivity + total
            block.samples += now.positions

    @property
    def finite(self) -> bool:
        """Whether all sums are finite."""
        return all(rows.finite for rows in self.block.rows.values())

    def merge(self, other: BlockCollector) -> None:
        """Add the sums of another collector, from other batches."""
        self.block.merge(other.block)

    def state(self) -> dict[str, Any]:
        """The sums, as plain values and tensors."""
        return self.block.state()

    def restore(self, state: Mapping[str, Any]) -> None:
        """Restore the result of `state`."""
        self.block.restore(state, self.device)


def _patches(block: Block, x: Tensor, kernel: int, size: tuple[int, ...], place: Tensor) -> Tensor | None:
    """Patches (R, (I + 1) * k * k) at some positions, those of a channel of ones last; None if the sizes do not fit."""
    x = torch.cat((x, torch.ones_like(x[:, :1])), 1)
    if block.same:
        x = pad_same(x, [kernel, kernel], list(block.stride), [1, 1])
    unfolded = functional.unfold(x, kernel, padding=0 if block.same else kernel // 2, stride=block.stride)
    if unfolded.shape[2] != math.prod(size):
        return None
    return unfolded[:, :, place].transpose(1, 2).flatten(0, 1)
