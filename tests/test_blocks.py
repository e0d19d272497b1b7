"""Whole blocks as one convolution, by least squares."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import linearize
from linearize.compress import compress
from linearize.families.blocks.apply import replace_block
from linearize.families.blocks.find import blocks_of
from linearize.families.blocks.fit import fit_block
from linearize.gating.gate import gates
from linearize.gating.groups import groups_of
from tests.observing import observe_blocks
from tests.processors import assert_same_outputs, assert_same_tensors
from tests.toys import QUIET


def norm(channels: int) -> nn.BatchNorm2d:
    layer = nn.BatchNorm2d(channels)
    layer.running_mean, layer.running_var = torch.randn(channels), torch.rand(channels) + 0.5
    return layer


class Inverted(nn.Module):
    """Expand, depthwise, project, and around it all the identity."""

    def __init__(self, kernel: int = 3, stride: int = 1, bend: float = 1.0) -> None:
        super().__init__()
        self.expand, self.norm1, self.act1 = nn.Conv2d(4, 24, 1, bias=False), norm(24), nn.ReLU6()
        self.deep = nn.Conv2d(24, 24, kernel, stride, kernel // 2, groups=24, bias=False)
        self.norm2, self.act2 = norm(24), nn.ReLU6()
        self.project, self.norm3 = nn.Conv2d(24, 4, 1, bias=False), norm(4)
        self.stride, self.bend = stride, bend

    def forward(self, x: Tensor) -> Tensor:
        y = self.act2(self.norm2(self.deep(self.act1(self.norm1(self.expand(x))))))
        y = self.norm3(self.project(y))
        return x + y if self.stride == 1 else y


def network(kernel: int = 3, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), Inverted(kernel, stride), nn.Flatten(), nn.LazyLinear(5))


@pytest.fixture
def data() -> list[Tensor]:
    return [torch.randn(8, 3, 8, 8) for _ in range(12)]


def build(data: list[Tensor], **options: int) -> nn.Sequential:
    model = network(**options).eval()
    with torch.no_grad():
        model(data[0])
    return model


@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (5, 1), (3, 2), (5, 2)])
def test_the_kernel_is_that_of_least_squares(data: list[Tensor], kernel: int, stride: int) -> None:
    model = build(data, kernel=kernel, stride=stride).double()
    data = [x.double() for x in data]
    gated = linearize.convert(model, data[0])
    (block,) = blocks_of(gated, groups_of(gated))
    assert [site.name for site in block.sites] == ["1.act1", "1.act2"]
    assert block.kernels == list(dict.fromkeys((kernel, 3)))
    observe_blocks(gated, data, [block])
    stem: Any = model[0]
    inverted: Any = model[1]
    seen: list[Tensor] = []
    handle = inverted.project.register_forward_hook(lambda *args: seen.append(args[2].detach()))
    with torch.no_grad():
        model(torch.cat(data))
        x = stem(torch.cat(data))
    handle.remove()
    for size in block.kernels:
        found = fit_block(block, size, ridge=1e-9)
        patches = functional.unfold(x, size, padding=size // 2, stride=stride).transpose(1, 2).flatten(0, 1)
        target = seen[0].flatten(2).transpose(1, 2).flatten(0, 1)
        features = torch.cat((patches, torch.ones(len(patches), 1, dtype=torch.float64)), 1)
        expected = torch.linalg.lstsq(features, target).solution
        torch.testing.assert_close(found.weight.flatten(1), expected[:-1].t(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found.bias, expected[-1], rtol=1e-4, atol=1e-5)


def test_a_replaced_block_is_one_layer_and_the_rest_stays(data: list[Tensor]) -> None:
    model = build(data)
    gated = linearize.convert(model, data[0])
    (block,) = blocks_of(gated, groups_of(gated))
    observe_blocks(gated, data, [block])
    replace_block(gated, block, 3, fit_block(block, 3))
    assert gates(gated) == {}
    inverted: Any = gated.get_submodule("1")
    assert type(inverted) is Inverted
    assert (type(inverted.expand), inverted.expand.kernel_size) == (nn.Conv2d, (3, 3))
    kinds = [type(getattr(inverted, name)) for name in ("norm1", "act1", "deep", "norm2", "act2", "project")]
    assert kinds == [nn.Identity] * 6
    assert type(inverted.norm3) is nn.BatchNorm2d


def test_a_linear_block_is_replaced_at_no_loss(data: list[Tensor]) -> None:
    model = build(data)
    inverted: Any = model[1]
    with torch.no_grad():
        for layer in (inverted.norm1, inverted.norm2):
            layer.bias.fill_(3)  # always between the two bends of ReLU6
            layer.weight.mul_(0.05)
            layer.running_mean.zero_()
    gated = linearize.convert(model, data[0])
    (block,) = blocks_of(gated, groups_of(gated))
    observe_blocks(gated, data, [block])
    assert 1e-6 < fit_block(block, 3, ridge=1e-9).loss < 1e-3  # at the border the padding differs
    bordered = fit_block(block, 3, ridge=1e-9, bordered=True)
    assert bordered.loss < 1e-8
    before = model(data[0])
    replace_block(gated, block, 3, bordered)
    torch.testing.assert_close(gated(data[0]), before, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("gradual", [None, 0.5])
def test_compress_takes_blocks_where_they_are_cheaper(tmp_path: Path, gradual: float | None) -> None:
    data = [torch.randn(8, 3, 24, 24) for _ in range(12)]  # large enough that little of it is border
    model: Any = build(data, stride=2)
    with torch.no_grad():  # well between 0 and 6: nearly linear, so that few channels would lose more
        for layer in (model[1].norm1, model[1].norm2):
            layer.weight.fill_(0.7)
            layer.bias.fill_(3.0)
    batches = [(x, torch.randint(5, (8,))) for x in data]
    tuned = None if gradual is None else {"epochs": 1, "gradual": gradual}
    result = compress(model, batches, flops=0.55, finetune=tuned, **QUIET)
    assert {site.form for site in result.plan.sites} <= {"block", "bordered block"}
    assert [site.site for site in result.plan.sites] == ["1.act1", "1.act2"]
    assert result.report.outcome is not None
    assert result.report.outcome.met
    assert result.report.verification
    linearize.save(result.model, tmp_path / "small.safetensors")
    again = linearize.load(tmp_path / "small.safetensors", model=build(data, stride=2))
    assert_same_tensors(result.model, again)
    assert_same_outputs(result.model, again, lambda each: [each(data[0])])
    if gradual is None:
        replayed = compress(model, batches, plan=result.plan, **QUIET)
        torch.testing.assert_close(replayed.model(data[0]), result.model(data[0]))


def test_what_is_no_block(data: list[Tensor]) -> None:
    dilated = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 4, 3, padding=2, dilation=2))
    pointwise = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 4, 1))
    shrinking = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 4, 3))
    for model in (dilated, pointwise, shrinking):
        gated = linearize.convert(model, data[0])
        assert blocks_of(gated, groups_of(gated)) == []
