"""One activation object in several layers, as in most detectors: each gate has statistics of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import linearize


class Block(nn.Module):
    """x + project(act(expand(x))); with `twice`, the activation is also applied to the block's output, ungated."""

    def __init__(self, hidden: int, act: nn.Module) -> None:
        super().__init__()
        self.expand, self.act, self.project = nn.Linear(8, hidden), act, nn.Linear(hidden, 8)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.project(self.act(self.expand(x)))
        return out


def net(hidden: Sequence[int], *, shared: bool, act: type[nn.Module] = nn.GELU) -> nn.Module:
    torch.manual_seed(0)
    one = act()
    blocks = [Block(width, one if shared else act()) for width in hidden]
    with torch.no_grad():
        for number, block in enumerate(blocks):
            block.expand.bias.add_(3.0 * (number - 1))
    return nn.Sequential(*blocks).eval()


BATCHES = [torch.randn(16, 5, 8, generator=torch.Generator().manual_seed(seed)) for seed in range(6)]


@pytest.mark.parametrize("act", [nn.GELU, nn.ReLU, nn.PReLU])
@pytest.mark.parametrize("hidden", [(32, 32, 32), (24, 40, 32)])
def test_statistics_are_of_each_layer(hidden: tuple[int, ...], act: type[nn.Module]) -> None:
    own, mixed = (
        linearize.calibrate(linearize.convert(net(hidden, shared=shared, act=act), BATCHES[0]), BATCHES, progress=False)
        for shared in (False, True)
    )
    assert list(own.sites) == list(mixed.sites)
    for name, site in own.sites.items():
        assert site.count == mixed.sites[name].count == 6 * 16 * 5
        for field in ("slope", "intercept", "residual"):
            assert torch.equal(getattr(site, field), getattr(mixed.sites[name], field))
    slopes = [site.slope.mean() for site in own.sites.values()]
    assert float(slopes[2] - slopes[0]) > 0.5  # the negative control: the layers do differ


def test_calls_without_a_gate_do_not_count() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.act = nn.GELU()
            self.block = Block(24, self.act)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.act(self.block(x))
            return out

    torch.manual_seed(0)
    gated = linearize.convert(Twice().eval(), BATCHES[0], include="block.act")
    found = linearize.calibrate(gated, BATCHES, progress=False)
    assert {name: site.count for name, site in found.sites.items()} == {"block.act": 6 * 16 * 5}


@pytest.mark.parametrize("budget", [{"flops": 0.6}, {"linear": 0.5}], ids=str)
def test_compress_with_layers_of_several_widths(budget: dict[str, Any]) -> None:
    made = {}
    for shared in (False, True):
        result = linearize.compress(net((24, 40, 32), shared=shared), BATCHES, **budget, rounds=0, progress=False)
        assert result.report.verification
        made[shared] = result.plan
    assert made[True].to_json() == made[False].to_json()
