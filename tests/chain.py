"""The chain of equivalences that every converted model must pass, with its negative control."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import linearize
from linearize.graph.capture import normalize_inputs, tensors_of

# Sums are reordered by folding, once per site; each reordering costs a few units of rounding.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}


@torch.no_grad()
def outputs(model: nn.Module, inputs: Any) -> list[Tensor]:
    """The tensors that a model puts out in eval mode."""
    args, kwargs = normalize_inputs(inputs)
    return tensors_of(model.eval()(*args, **kwargs))


def error(reference: list[Tensor], candidate: list[Tensor]) -> float:
    """Largest relative error over all outputs: max |a - b| / max |a|."""
    assert len(reference) == len(candidate)
    worst = 0.0
    for a, b in zip(reference, candidate, strict=True):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        if a.is_floating_point():
            scale = a.abs().max().clamp_min(torch.finfo(a.dtype).tiny)
            worst = max(worst, float((a - b).abs().max() / scale))
        else:
            assert torch.equal(a, b)
    return worst


def off(found: Tensor, expected: Tensor) -> float:
    """The largest error, relative to the largest value."""
    return float((found - expected).abs().max() / expected.abs().max())


def made(build: Callable[[], nn.Module], sizes: tuple[int, ...], dtype: torch.dtype) -> tuple[nn.Module, Tensor]:
    """A model with random weights, and random inputs, the same each time."""
    torch.manual_seed(0)
    return build().eval().to(dtype), torch.randn(sizes, dtype=dtype)


@torch.no_grad()
def randomize(model: nn.Module, share: float, seed: int = 0) -> None:
    """Make a random share of every site's channels linear, with random surrogates (constants in gated units)."""
    generator = torch.Generator().manual_seed(seed)
    for gate in linearize.gates(model).values():
        like = gate.slope
        mask = torch.randperm(gate.channels, generator=generator) < round(share * gate.channels)
        slope = torch.randn(gate.channels, generator=generator)
        slope[: gate.channels // 4] = 0.0  # some channels become constants: they can be dropped
        intercept = torch.randn(gate.channels, generator=generator)
        intercept[: gate.channels // 8] = 0.0
        gate.slope.copy_(torch.zeros_like(like) if gate.gated_unit else slope.to(like))
        gate.intercept.copy_(intercept.to(like))
        gate.linearize_(mask)


def check_chain(
    model: nn.Module, inputs: Any, share: float = 0.5, *, when: str = "always"
) -> tuple[nn.Module, nn.Module]:
    """original = gated (bitwise); gated with linear channels != original; = collapsed. Returns gated and collapsed."""
    original = outputs(model, inputs)
    gated = linearize.convert(model, inputs)
    assert isinstance(gated, type(model))
    assert all(torch.equal(a, b) for a, b in zip(original, outputs(gated, inputs), strict=True))
    randomize(gated, share)
    moved = outputs(gated, inputs)
    dtype = next(t.dtype for t in moved if t.is_floating_point())
    assert error(original, moved) > 100 * TOLERANCE[dtype], "negative control: linear channels must change the function"
    collapsed = linearize.collapse(gated, when=when)  # type: ignore[arg-type]
    assert isinstance(collapsed, type(model))
    assert not any(isinstance(module, linearize.ChannelGate) for module in collapsed.modules())
    assert error(moved, outputs(collapsed, inputs)) <= TOLERANCE[dtype]
    return gated, collapsed
