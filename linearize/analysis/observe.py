"""What a converted model's channels do on data: ranges, parallel channels, channels that no output depends on."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from linearize.errors import DataError
from linearize.gating.gate import ChannelGate, gates
from linearize.graph.capture import Inputs, tensors_of
from linearize.running.models import call

if TYPE_CHECKING:
    from linearize.analysis.symmetries import Symmetry

# Sums of some thousand terms in float64, relative to the largest value.
_EXACT = 1e-12
_TRIALS = 256  # so many channels are tried one by one, if they cannot go together


@dataclass
class Observation:
    """What the inputs of a gate were.

    Attributes:
        low, high: least and greatest value of each channel: (C,).
        products: sums of products of channels: (C, C).
        batches: runs the model again and gives each input of this gate as (values, C).
    """

    low: Tensor
    high: Tensor
    products: Tensor
    batches: Callable[[], Sequence[Tensor]]

    def parallel(self, channels: Sequence[int], any_scale: bool) -> list[dict[int, float]]:
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
            if worst <= _EXACT * largest:
                held[c] = scale
        return held


@torch.no_grad()
def observe(model: nn.Module, found: Mapping[str, ChannelGate], batches: Sequence[Inputs]) -> dict[str, Observation]:
    """Run a model in eval mode and watch the inputs of its gates.

    Raises:
        DataError: NaN or infinity turns up there.
    """
    seen: dict[str, Observation] = {}

    def watch(name: str) -> Callable[..., None]:
        def note(gate: Any, args: tuple[Any, ...]) -> None:
            x = args[0].detach().movedim(gate.axis, -1).flatten(0, -2)
            low, high, products = x.amin(0), x.amax(0), x.T @ x
            if name in seen:
                old = seen[name]
                low, high = torch.minimum(low, old.low), torch.maximum(high, old.high)
                products = products + old.products
            seen[name] = Observation(low, high, products, lambda: _inputs(model, found[name], batches))

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
    """Channels whose output, to first order, could as well be 0: it is 0, or its gradient is, at every value."""
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


@torch.no_grad()
def ablated(
    model: nn.Module,
    found: Mapping[str, ChannelGate],
    batches: Sequence[Inputs],
    candidates: Mapping[str, Sequence[int]],
    known: Sequence[Symmetry],
) -> dict[str, list[int]]:
    """Those candidates that can be set to 0, together and along with what is known, and leave every output alone."""
    pairs = [(name, c) for name, channels in candidates.items() for c in channels]
    if not pairs:
        return {}
    trial = _Trial(model, found, batches, known)
    chosen = pairs if trial.same(pairs) else []
    if not chosen:
        for pair in reversed(pairs[:_TRIALS]):  # the last layers first: what they ignore, they ignore for good
            if trial.same([*chosen, pair]):
                chosen.append(pair)
    return {name: sorted(c for other, c in chosen if other == name) for name in candidates}


class _Trial:
    """Compares a model with itself when some channels are set to 0: alone, and with all known symmetries taken out."""

    def __init__(
        self,
        model: nn.Module,
        found: Mapping[str, ChannelGate],
        batches: Sequence[Inputs],
        known: Sequence[Symmetry],
    ) -> None:
        from linearize.analysis.reduce import merge_parallel

        self.batches = batches
        self.expected = self._outputs(model)
        self.versions = [(model, found)]
        if known:
            merged = copy.deepcopy(model)
            inside = gates(merged)
            for record in known:
                if record.kind == "parallel":
                    merge_parallel(merged, record, inside[record.site])
                for c, slope, intercept in zip(record.channels, record.slopes, record.intercepts, strict=False):
                    _replace(inside[record.site], c, slope, intercept)
            self.versions.append((merged, inside))

    def _outputs(self, model: nn.Module) -> list[Tensor]:
        return [t for batch in self.batches for t in tensors_of(call("model", model, batch))]

    def same(self, pairs: Sequence[tuple[str, int]]) -> bool:
        """True if no output changes."""
        return all(self._equal(model, found, pairs) for model, found in self.versions)

    def _equal(self, model: nn.Module, found: Mapping[str, ChannelGate], pairs: Sequence[tuple[str, int]]) -> bool:
        held = {name: {k: v.clone() for k, v in gate.state_dict().items()} for name, gate in found.items()}
        try:
            for name, c in pairs:
                _replace(found[name], c, 0.0, 0.0)
            return all(_close(a, b) for a, b in zip(self.expected, self._outputs(model), strict=True))
        finally:
            for name, gate in found.items():
                gate.load_state_dict(held[name])


def _replace(gate: ChannelGate, channel: int, slope: float, intercept: float) -> None:
    gate.slope[channel], gate.intercept[channel], gate.frozen[channel] = slope, intercept, True


def _close(a: Tensor, b: Tensor) -> bool:
    if not a.numel() or not a.is_floating_point():
        return torch.equal(a, b)
    return float((a - b).abs().max()) <= _EXACT * max(1e-300, float(a.abs().max()))
