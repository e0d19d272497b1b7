"""What the experts of a bank give, and what their channels are: seen without knowing the code between them.

If the last matrix only selects channels, then what comes out is these channels.

Shape letters: R rows, E experts, M channels of an expert, O features of what comes out.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from linearize.families.experts.place import ExpertChannels, Experts
from linearize.families.experts.twin import borrowed, first_tensor

__all__ = ["Bank"]


class Bank:
    """The experts of a place by themselves.

    Args:
        bank: the module that holds them; it is left as it is.
        place: where it was found.
    """

    def __init__(self, bank: nn.Module, place: Experts) -> None:
        self.whole, self.place = borrowed(bank).eval(), place

    def given(self, x: Tensor, index: Tensor, bank: nn.Module | None = None) -> Tensor:
        """What experts `index` (R,) give for rows x (R, D), not weighted: (R, O)."""
        values = x, index[:, None], torch.ones_like(index[:, None], dtype=x.dtype)
        args: dict[int, Any] = {}
        kwargs: dict[str, Any] = {}
        for key, value in zip(self.place.given, values, strict=True):
            (args if isinstance(key, int) else kwargs)[key] = value  # type: ignore[index]
        out = first_tensor((bank or self.whole)(*(args[key] for key in sorted(args)), **kwargs))
        if out is None or out.shape[0] != len(x):
            raise ValueError("it gives no row for each row")
        return out

    def channels(self, x: Tensor, index: Tensor, channels: ExpertChannels) -> Tensor:
        """The channels of experts `index` (R,) for rows x (R, D), as the last matrix reads them: (R, M)."""
        twin = borrowed(self.whole)
        down = twin.get_parameter(channels.down)
        axis = channels.slots[channels.down].axis
        outputs = down.shape[3 - axis]
        if channels.bias:
            zeros = torch.zeros_like(twin.get_parameter(channels.bias))
            twin._parameters[channels.bias] = nn.Parameter(zeros, requires_grad=False)
        found = []
        for start in range(0, channels.width, outputs):
            some = min(outputs, channels.width - start)
            chosen = torch.zeros(outputs, channels.width, dtype=down.dtype, device=down.device)
            chosen[range(some), range(start, start + some)] = 1
            matrix = chosen if axis == 2 else chosen.t()
            value = matrix.expand(len(down), *matrix.shape).contiguous()
            twin._parameters[channels.down] = nn.Parameter(value, requires_grad=False)
            found.append(self.given(x, index, twin)[:, :some])
        return torch.cat(found, 1)

    def misread(self, x: Tensor, index: Tensor, channels: ExpertChannels) -> float:
        """How far what experts give is from their last matrix times their channels, relative to the largest value."""
        h = self.channels(x, index, channels).double()
        down = self.whole.get_parameter(channels.down).double()[index]
        matrix = down if channels.slots[channels.down].axis == 2 else down.transpose(1, 2)
        made = (matrix @ h[:, :, None])[:, :, 0]
        if channels.bias:
            made = made + self.whole.get_parameter(channels.bias).double()[index]
        out = self.given(x, index).double()
        return float((made - out).abs().max() / out.abs().max().clamp_min(1e-300))
