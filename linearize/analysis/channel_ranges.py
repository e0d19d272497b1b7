"""What the channels of a converted model do on data: ranges, parallel channels, channels that no output needs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from linearize.analysis.ablation import EXACT
from linearize.errors import DataError
from linearize.gating.gate import ChannelGate
from linearize.graph.capture import Inputs, tensors_of
from linearize.running.models import call


@dataclass
class ChannelRange:
    """The inputs of a gate on data: their ranges, and channels that look parallel.

    Attributes:
        low, high: least and greatest value of each channel: (C,).
        products: sums of products of channels: (C, C).
        batches: runs the model again and gives each input of this gate as (values, C).
    """

    low: Tensor
    high: Tensor
    products: Tensor
    batches: Callable[[], Sequence[Tensor]]

    def parallel(self, channels: Sequence[int], *, any_scale: bool) -> list[dict[int, float]]:
        """Groups of channels with the scale of each: candidates by their angle, proven value by value."""
        norms = self.products.diagonal().clamp_min(0).sqrt()
        groups: list[dict[int, float]] = []
        for c in channels:
            if float(norms[c]) == 0:
                continue
            for group in groups:
                first = next(iter(group))
                cosine = float(self.products[first, c] / (norms[first] * norms[c]))
                scale = float(self.products[first, c] / self.products[first, first])
                if 1 - cosine < 1e-9 and (any_scale or abs(scale - 1) < 1e-9):
                    group[c] = scale
                    break
            else:
                groups.append({c: 1.0})
        groups = [group for group in groups if len(group) > 1]
        seen = self.batches() if groups else []
        return [group for group in (self._proven(group, seen) for group in groups) if len(group) > 1]

    def _proven(self, group: dict[int, float], seen: Sequence[Tensor]) -> dict[int, float]:
        first = next(iter(group))
        held = {}
        for c, scale in group.items():
            worst = max(float((x[:, c] - scale * x[:, first]).abs().max()) for x in seen)
            largest = max(float(self.high[c].abs()), float(self.low[c].abs()))
            if worst <= EXACT * largest:
                held[c] = scale
        return held


@torch.no_grad()
def channel_ranges(
    model: nn.Module, found: Mapping[str, ChannelGate], batches: Sequence[Inputs]
) -> dict[str, ChannelRange]:
    """Run a model in eval mode and watch the inputs of its gates.

    Raises:
        DataError: NaN or infinity turns up there.
    """
    seen: dict[str, ChannelRange] = {}

    def watch(name: str) -> Callable[..., None]:
        def note(gate: Any, args: tuple[Any, ...]) -> None:
            x = args[0].detach().movedim(gate.axis, -1).flatten(0, -2)
            low, high, products = x.amin(0), x.amax(0), x.T @ x
            if name in seen:
                old = seen[name]
                low, high = torch.minimum(low, old.low), torch.maximum(high, old.high)
                products = products + old.products
            seen[name] = ChannelRange(low, high, products, lambda: _inputs(model, found[name], batches))

        return note

    with ExitStack() as stack:
        for name, gate in found.items():
            stack.callback(gate.register_forward_pre_hook(watch(name)).remove)
        for batch in batches:
            call("model", model, batch)
    for name, what in seen.items():
        if not bool((what.low.isfinite() & what.high.isfinite()).all()):
            raise DataError(name, "found NaN or infinity at this activation", "Check the samples, and the weights.")
    return seen


@torch.no_grad()
def _inputs(model: nn.Module, gate: ChannelGate, batches: Sequence[Inputs]) -> list[Tensor]:
    held: list[Tensor] = []
    hook = gate.register_forward_pre_hook(
        lambda module, args: held.append(args[0].movedim(module.axis, -1).flatten(0, -2))
    )
    try:
        for batch in batches:
            call("model", model, batch)
    finally:
        hook.remove()
    return held


def unread(model: nn.Module, found: Mapping[str, ChannelGate], batches: Sequence[Inputs]) -> dict[str, list[int]]:
    """Channels without effect, to first order: the output, or its gradient, is 0 at every value."""
    largest: dict[str, Tensor] = {}
    generator = torch.Generator().manual_seed(0)
    for batch in batches:
        held: list[tuple[str, Tensor]] = []

        def keep(name: str, into: list[tuple[str, Tensor]]) -> Callable[..., None]:
            def note(_module: Any, _args: Any, result: Tensor) -> None:
                into.append((name, result))

            return note

        with ExitStack() as stack, torch.enable_grad():
            for name, gate in found.items():
                stack.callback(gate.register_forward_hook(keep(name, held)).remove)
            outputs = [t for t in tensors_of(call("model", model, batch)) if t.is_floating_point() and t.requires_grad]
            if not outputs or not held:
                return {}
            weights = [torch.randn(t.shape, generator=generator, dtype=t.dtype).to(t.device) for t in outputs]
            total = torch.stack([(t * w).sum() for t, w in zip(outputs, weights, strict=True)]).sum()
            grads = torch.autograd.grad(total, [t for _, t in held], allow_unused=True)
        for (name, output), grad in zip(held, grads, strict=True):
            value = torch.zeros_like(output) if grad is None else grad * output.detach()
            most = value.abs().movedim(found[name].axis, 0).flatten(1).amax(1)
            largest[name] = torch.maximum(largest[name], most) if name in largest else most
    return {name: [int(c) for c in (most == 0).nonzero().flatten()] for name, most in largest.items()}
