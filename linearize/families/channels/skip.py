"""Where a linear skip around a site can start: at the input of its producer, for each position.

Shape letters: I inputs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from linearize.families.channels.editable import consumers_of, conv_groups
from linearize.sites.site import Port, Site
from linearize.surgery.probe import has_own_forward

__all__ = ["SkipSource", "skip_source"]

# Beyond this no skip is tried beside a spatial consumer: its curves take several times as long as those without.
_WIDEST_WITH_SKIP = 1500


@dataclass(frozen=True)
class SkipSource:
    """Where a linear skip starts: the input of a map at the same position, or at the middle of its kernel.

    Attributes:
        port: the map.
        inputs: I.
        taps: of its kernel.
        steps: strides from its input to where the consumer writes.
    """

    port: Port
    inputs: int
    taps: int
    steps: tuple[int, ...]

    def columns(self) -> Tensor:
        """The columns of the middle kernel position in the map's `matrix`, (I,)."""
        return torch.arange(self.inputs) * self.taps + self.taps // 2

    def at_outputs(self, x: Tensor) -> Tensor:
        """The input at the positions that the consumer writes to."""
        if set(self.steps) <= {1}:
            return x
        index: Any = (..., *(slice(None, None, step) for step in self.steps))
        return x[index]


def skip_source(model: nn.Module, site: Site) -> SkipSource | None:
    """The map from whose input a linear skip can start, so that its rows match those of the consumers.

    Of convolutions the middle taps alone: a skip of kernel 1x1 beside channels that look around.
    """
    port = site.producer if site.up is None else site.up
    if port is None or site.producer is None or not site.steady or conv_groups(model, port) > 1:
        return None
    if site.up_folds or site.consumer_folds or site.bent:
        return None
    readers = [site.producer, *site.consumers] if site.up is not None else list(site.consumers)
    if len({p.dims for p in (port, *readers)}) != 1:
        return None
    alone = len(readers) == 1
    if not all(_centred(model, p) if alone or p == port else _in_place(model, p) for p in (port, *readers)):
        return None
    if site.up is not None and not _in_place(model, port):
        return None
    if any(c.spatial and c.group * site.channels > _WIDEST_WITH_SKIP for c in consumers_of(model, site)):
        return None
    module: Any = model.get_submodule(port.module)
    steps = _numbers(getattr(module, "stride", ()))
    if alone:
        last = _numbers(getattr(model.get_submodule(readers[0].module), "stride", ()))
        steps = tuple(one * other for one, other in zip(steps, last, strict=True))
    return SkipSource(port, module.weight.shape[0 if port.transposed else 1], math.prod(module.weight.shape[2:]), steps)


def _in_place(model: nn.Module, port: Port) -> bool:
    """True if a map works at every position by itself."""
    module: Any = model.get_submodule(port.module)
    unpadded = not any(_numbers(getattr(module, "padding", 0)))
    return unpadded and math.prod(module.weight.shape[2:]) == 1 and set(_numbers(getattr(module, "stride", ()))) <= {1}


def _centred(model: nn.Module, port: Port) -> bool:
    """True if the middle tap of a map's kernel stands on the position that the output has, times the stride."""
    module: Any = model.get_submodule(port.module)
    kernel = tuple(int(k) for k in module.weight.shape[2:])
    if math.prod(kernel) == 1:
        return not any(_numbers(getattr(module, "padding", 0)))
    reach = tuple(d * (k // 2) for d, k in zip(module.dilation, kernel, strict=True))
    return has_own_forward(module) and all(k % 2 for k in kernel) and module.padding in ("same", reach)


def _numbers(value: Any) -> tuple[int, ...]:
    """Padding or stride in numbers; padding in words pads nothing, as the kernel is 1x1."""
    if isinstance(value, str):
        return (0,)
    return value if isinstance(value, tuple) else (value,)
