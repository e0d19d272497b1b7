"""A model's own surgery after ours: `fuse()` and its kin read a folded norm, and give the same function."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

import linearize
from linearize.errors import UsageError
from linearize.surgery.fusing import folds_by_itself
from linearize.surgery.layers import FoldedNorm
from tests.chain import error, outputs, randomize
from tests.toys import shaken


class Careful(nn.Module):
    """Fuses by torch's function, which knows of biases."""

    conv: Any
    norm: Any

    def __init__(self, inputs: int, width: int, act: bool = True) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(inputs, width, 1, bias=False), shaken(nn.BatchNorm2d(width))
        self.act = nn.SiLU() if act else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(x)))

    def fuse(self) -> None:
        self.conv = fuse_conv_bn_eval(self.conv, self.norm)
        self.norm = nn.Identity()


class Careless(Careful):
    """Fuses by its own arithmetic, and knows that its convolution has no bias."""

    @torch.no_grad()
    def fuse(self) -> None:
        conv, norm = self.conv, self.norm
        scale = norm.weight / (norm.running_var + norm.eps).sqrt()
        kind: Any = {"stride": conv.stride, "padding": conv.padding, "dtype": conv.weight.dtype}
        fused: Any = nn.Conv2d(conv.weight.shape[1], len(conv.weight), conv.kernel_size, **kind)
        fused.weight.copy_(conv.weight * scale[:, None, None, None])
        fused.bias.copy_(norm.bias - norm.running_mean * scale)
        self.conv, self.norm = fused, nn.Identity()


def net(kind: type[Careful]) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return nn.Sequential(kind(4, 24), kind(24, 6, act=False)).eval().double(), torch.randn(2, 4, 5, 5).double()


def small(model: nn.Module, inputs: Any, share: float = 0.6) -> nn.Module:
    gated = linearize.convert(model, inputs)
    randomize(gated, share)
    return linearize.collapse(gated, when="always")


def fuse(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, Careful):
            module.fuse()


@pytest.mark.parametrize("kind", [Careful, Careless])
def test_the_original_fuses(kind: type[Careful]) -> None:
    model, x = net(kind)
    before = outputs(model, x)
    fuse(model)
    assert error(before, outputs(model, x)) <= 1e-12


@pytest.mark.parametrize("saved", [False, True])
@pytest.mark.parametrize("kind", [Careful, Careless])
def test_the_first_layer_fuses_after_collapsing(kind: type[Careful], saved: bool, tmp_path: Path) -> None:
    model, x = net(kind)
    made: Any = small(model, x)
    if saved:
        linearize.save(made, tmp_path / "small.safetensors")
        made = linearize.load(tmp_path / "small.safetensors", model=net(kind)[0])
    before = outputs(made, x)
    assert isinstance(made[0].norm, FoldedNorm)
    assert made[0].norm.shift == (kind is Careless), "only who forgets the bias pays for it"
    assert (made[0].conv.bias is None) == made[0].norm.shift
    made[0].fuse()
    assert error(before, outputs(made, x)) <= 1e-12


def test_a_layer_that_carries_fuses_where_it_is_read_only() -> None:
    model, x = net(Careless)
    made: Any = small(model, x)
    before = outputs(made, x)
    assert made[1].conv.weight.shape == (6, made[0].conv.out_channels, 1, 1)
    fuse(made)
    assert error(before, outputs(made, x)) <= 1e-12
    assert type(made[1].conv) is nn.Conv2d


def test_a_layer_that_carries_cannot_be_set_from_outside() -> None:
    model, x = net(Careful)
    made: Any = small(model, x)
    before = outputs(made, x)
    with pytest.raises(UsageError, match=r"before linearize\.convert"):
        made[1].fuse()
    assert error(before, outputs(made, x)) == 0


def test_an_ordinary_container_keeps_an_identity() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 24, 1), shaken(nn.BatchNorm2d(24)), nn.ReLU(), nn.Conv2d(24, 6, 1)).eval()
    made = small(model, torch.randn(2, 4, 5, 5))
    assert type(made[1]) is nn.Identity  # type: ignore[index]


def test_whose_class_folds_norms() -> None:
    class Calls(nn.Module):
        def switch(self) -> Any:
            return _by_hand(self)

    assert [folds_by_itself(kind) for kind in (Careful, Careless, Calls, nn.BatchNorm2d)] == [False, True, True, False]


def _by_hand(module: Any) -> Any:
    return module.running_var


@pytest.mark.parametrize("name", ["repvit_m0_9", "levit_128s"])
@pytest.mark.slow
def test_reparameterised_by_timm(name: str) -> None:
    timm = pytest.importorskip("timm")
    from timm.utils import reparameterize_model

    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5).eval()
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            nn.init.uniform_(module.running_var, 0.5, 2.0)  # type: ignore[arg-type]
            nn.init.uniform_(module.bias, -0.5, 0.5)
            nn.init.uniform_(module.weight, 0.5, 1.0)
    x = torch.randn(1, 3, 224 if name.startswith("levit") else 64, 224 if name.startswith("levit") else 64)
    gated = linearize.convert(model, x)
    for gate in linearize.gates(gated).values():
        gate.linearize_(torch.arange(gate.channels) < 0.6 * gate.channels)
    made = linearize.collapse(gated)
    assert linearize.verify(gated, made, x)
    assert not linearize.verify(model, made, x), "negative control"
    fused = reparameterize_model(made)
    assert not any(isinstance(module, FoldedNorm) for module in fused.modules())
    assert linearize.verify(made, fused, x)
