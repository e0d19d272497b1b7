"""Find channels that can be set to 0 without changing any output, by trying it."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from linearize.analysis.symmetry import Symmetry
from linearize.gating.gate import ChannelGate, gates
from linearize.graph.capture import Inputs, tensors_of
from linearize.running.models import call

# Sums of some thousand terms in float64, relative to the largest value.
EXACT = 1e-12


_TRIALS = 256  # so many channels are tried one by one, if they cannot go together


@torch.no_grad()
def ablated(
    model: nn.Module,
    found: Mapping[str, ChannelGate],
    batches: Sequence[Inputs],
    candidates: Mapping[str, Sequence[int]],
    known: Sequence[Symmetry],
) -> dict[str, list[int]]:
    """Those candidates that can be set to 0 together, along with the known ones, without changing any output."""
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
    return float((a - b).abs().max()) <= EXACT * max(1e-300, float(a.abs().max()))
