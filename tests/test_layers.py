"""The partial activation on shapes and memory layouts of all kinds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import linearize
from linearize.surgery.layers import PartialActivation

# Input shape, channel axis, channels kept: odd sizes, no channel carried, nothing in the batch.
CASES = [
    ((3, 5, 8), -1, 5),
    ((3, 5, 8), -1, 3),
    ((3, 5, 8), -1, 8),
    ((2, 8, 4, 4), -3, 6),
    ((8,), -1, 5),
    ((0, 8), -1, 7),
]


@pytest.mark.parametrize("activation", [nn.GELU(), nn.ReLU(inplace=True), nn.Identity()], ids=str)
@pytest.mark.parametrize(("shape", "axis", "keep"), CASES, ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
def test_same_with_and_without_gradients(
    activation: nn.Module, shape: tuple[int, ...], axis: int, keep: int, channels_last: bool
) -> None:
    x = torch.randn(shape, dtype=torch.float64)
    if channels_last and x.dim() != 4:
        pytest.skip("a memory format of images")
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    layer, before = PartialActivation(activation, keep, axis), x.clone()
    with torch.no_grad():
        found = layer(x)
    recorded = layer(x.clone().requires_grad_())
    torch.testing.assert_close(found, recorded.detach(), rtol=1e-14, atol=1e-14)
    assert torch.equal(found.narrow(axis, keep, shape[axis] - keep), before.narrow(axis, keep, shape[axis] - keep))
    assert torch.equal(x, before), "the input is not the layer's to change"
    assert found.stride() == recorded.stride() or not found.numel()


@pytest.mark.parametrize(("shape", "axis", "keep"), CASES, ids=str)
def test_in_place_gives_the_same_bits(shape: tuple[int, ...], axis: int, keep: int) -> None:
    x = torch.randn(shape)
    with torch.no_grad():
        expected = PartialActivation(nn.GELU(), keep, axis)(x)
        mine = x.clone()
        found = PartialActivation(nn.GELU(), keep, axis, inplace=True)(mine)
    assert torch.equal(found, expected)
    assert found.data_ptr() == mine.data_ptr()
    recorded = PartialActivation(nn.GELU(), keep, axis, inplace=True)(x.clone().requires_grad_())
    recorded.sum().backward()
    assert torch.equal(recorded.detach(), expected)


@pytest.mark.parametrize("inplace", [False, True])
def test_in_place_only_where_the_original_was(inplace: bool) -> None:
    """Whoever keeps what the layer before it puts out finds it unchanged, unless the original changed it, too."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(inplace=inplace), nn.Linear(16, 4))
    gated = linearize.convert(model, torch.randn(2, 4))
    linearize.gates(gated)["1"].linearize_(torch.arange(16) < 9)
    small: Any = linearize.collapse(gated, when="always")
    assert isinstance(small[1], PartialActivation)
    assert small[1].inplace is inplace
    seen: list[torch.Tensor] = []
    small[0].register_forward_hook(lambda *call: seen.extend((call[-1], call[-1].clone())))
    with torch.no_grad():
        small(torch.randn(3, 4))
    assert torch.equal(*seen) is not inplace


@torch.no_grad()
def test_can_be_exported_traced_and_mapped() -> None:
    layer, x = PartialActivation(nn.GELU(), 6, -1), torch.randn(4, 8)
    exported = torch.export.export(layer, (x,), strict=False).module()
    for other in (exported, torch.fx.symbolic_trace(layer), torch.vmap(layer)):
        torch.testing.assert_close(other(x), layer(x))
