"""Constant maps per channel besides BatchNorm: frozen norms, affine layers, layer scales, shifts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import linearize
from linearize.algebra.constants import OPERATIONS, evaluate, expression_of, names_in
from linearize.sites.site import Site
from linearize.surgery.form_choice import make_plan
from tests.chain import check_chain, error, made, outputs, randomize


class Frozen(nn.Module):
    """A batch norm whose statistics are buffers, as detection libraries have it."""

    def __init__(self, channels: int, eps: float = 0.03) -> None:
        super().__init__()
        self.eps = eps
        for name in ("weight", "bias", "mean"):
            self.register_buffer(name, torch.randn(channels))
        self.register_buffer("var", torch.rand(channels) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        weight, bias, mean, var = (
            getattr(self, name).reshape(1, -1, 1, 1) for name in ("weight", "bias", "mean", "var")
        )
        scale = weight * (var + self.eps).rsqrt()
        return x * scale + (bias - mean * scale)


class Affine(nn.Module):
    """Scale and shift on the last axis, in one op."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.alpha, self.beta = nn.Parameter(torch.randn(1, 1, channels)), nn.Parameter(torch.randn(1, 1, channels))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addcmul(self.beta, self.alpha, x)


class Arithmetic(nn.Module):
    """Numbers, a divisor, a subtraction from the left, in place and not."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.rand(channels) + 0.5), nn.Parameter(torch.randn(channels))
        self.exponent = nn.Parameter(torch.randn(channels))

    def forward(self, x: Tensor) -> Tensor:
        x = 3 * x / self.a
        x = (self.b - x) * self.exponent.exp() + 0.25
        return torch.add(torch.rsub(x, self.b, alpha=2), -self.a, alpha=0.5) * 2 * 2


class NormAct(nn.Module):
    """A frozen norm with the activation inside."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gamma, self.beta = nn.Parameter(torch.randn(channels, 1, 1)), nn.Parameter(torch.randn(channels, 1, 1))
        self.drop, self.act = nn.Identity(), nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(x * self.gamma + self.beta))


class Inline(nn.Module):
    """The constants are parameters and buffers of the block, and the maps stand in its forward."""

    shift: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 1)
        self.gamma, self.beta = nn.Parameter(torch.randn(8)), nn.Parameter(torch.randn(1, 8, 1, 1))
        self.register_buffer("shift", torch.randn(8))
        self.layer_scale = nn.Parameter(torch.rand(8, 1, 1) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x) * self.gamma.view(1, -1, 1, 1) + self.beta
        h = functional.gelu(h)
        h = (h - self.shift[None, :, None, None]) / self.layer_scale
        return self.second(h)


class Channels(nn.Module):
    """A layer scale on the last axis, between matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 12), Affine(12), nn.GELU(), Affine(12), nn.Linear(12, 3))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x)
        return out


def conv_net(norm: Any, *, after: bool = False, kernel: int = 1) -> nn.Module:
    body = [nn.Conv2d(3, 8, 3, padding=1, bias=False), norm(8), nn.ReLU(inplace=True)]
    return nn.Sequential(*body, *([norm(8)] if after else []), nn.Conv2d(8, 4, kernel, padding=kernel // 2))


class Positions(nn.Module):
    """Arithmetic on the last axis, between matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 9), Arithmetic(9), nn.Tanh(), Arithmetic(9), nn.Linear(9, 3))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x)
        return out


IMAGE, ROWS = (2, 3, 9, 7), (2, 5, 4)
NETS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "frozen": (lambda: conv_net(Frozen), IMAGE),
    "frozen on both sides": (lambda: conv_net(Frozen, after=True), IMAGE),
    "frozen, spatial consumer": (lambda: conv_net(Frozen, kernel=3), IMAGE),
    "affine": (Channels, ROWS),
    "arithmetic": (Positions, ROWS),
    "inline": (Inline, IMAGE),
    "norm-act": (lambda: nn.Sequential(nn.Conv2d(3, 8, 1), NormAct(8), nn.Conv2d(8, 4, 3, padding=1)), IMAGE),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("when", ["always", "cheaper"])
@pytest.mark.parametrize("share", [0.5, 1.0])
@pytest.mark.parametrize("name", NETS)
def test_folds_exactly(name: str, share: float, when: str, dtype: torch.dtype) -> None:
    model, x = made(*NETS[name], dtype)
    gated, _ = check_chain(model, x, share, when=when)
    assert all(gate.site is not None and gate.site.reason is None for gate in linearize.gates(gated).values())
    if when == "always":
        assert all(site.form != "partial activation" for site in make_plan(gated, when="always").sites)


@pytest.mark.parametrize("name", NETS)
def test_saved_loaded_and_trained(name: str, tmp_path: Path) -> None:
    model, x = made(*NETS[name], torch.float64)
    gated = linearize.convert(model, x)
    randomize(gated, 0.5)
    linearize.save(gated, tmp_path / "gated.safetensors")
    again = linearize.load(tmp_path / "gated.safetensors", model=made(*NETS[name], torch.float64)[0])
    assert [g.site for g in linearize.gates(again).values()] == [g.site for g in linearize.gates(gated).values()]
    collapsed = linearize.collapse(gated, when="always")
    linearize.save(collapsed, tmp_path / "small.safetensors")
    loaded = linearize.load(tmp_path / "small.safetensors", model=made(*NETS[name], torch.float64)[0])
    state = collapsed.state_dict()
    assert state.keys() == loaded.state_dict().keys()
    assert all(torch.equal(state[key], value) for key, value in loaded.state_dict().items())
    assert error(outputs(gated, x), outputs(loaded, x)) <= 1e-12
    assert error(outputs(gated, x), outputs(linearize.collapse(again, when="always"), x)) <= 1e-12
    loaded.train()(x).square().mean().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in loaded.parameters())


def test_what_stands_in_place_of_the_maps() -> None:
    model, x = made(*NETS["frozen on both sides"], torch.float64)
    _, collapsed = check_chain(model, x)
    assert [type(collapsed.get_submodule(name)) for name in ("1", "3")] == [nn.Identity, nn.Identity]
    inline, x = made(*NETS["inline"], torch.float64)
    _, collapsed = check_chain(inline, x)
    neutral = {name: collapsed.state_dict()[name].flatten().tolist() for name in ("gamma", "beta", "shift")}
    assert neutral == {"gamma": [1.0], "beta": [0.0], "shift": [0.0]}
    assert isinstance(collapsed.get_parameter("gamma"), nn.Parameter)
    assert inline.get_parameter("gamma").numel() == 8, "the user's model is left alone"


def test_a_spatial_consumer_takes_a_scale_but_no_shift() -> None:
    """Zeros beyond the border are behind the shift: it does not reach them."""

    class Scale(nn.Module):
        def __init__(self, channels: int) -> None:
            super().__init__()
            self.gamma = nn.Parameter(torch.randn(channels, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.gamma

    torch.manual_seed(0)
    x = torch.randn(2, 3, 9, 7, dtype=torch.float64)
    for norm, form in ((Scale, "merged (input)"), (Frozen, "partial activation")):
        model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), norm(8), nn.Conv2d(8, 4, 3, padding=1)).double().eval()
        gated, _ = check_chain(model, x)
        assert [site.form for site in make_plan(gated, when="always").sites] == [form]


class Awkward(nn.Module):
    """Maps that cannot be taken out of the code: a number, a computed constant, a parameter with another use."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 3)
        self.gamma = nn.Parameter(torch.rand(8) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.first(x)
        if self.kind == "number":
            h = h + 0.5
        elif self.kind == "computed":
            h = h * self.gamma.sqrt()
        elif self.kind == "twice":
            h = h * self.gamma
        elif self.kind == "positions":
            h = h * torch.arange(5.0, dtype=h.dtype)[:, None]
        h = functional.relu(h)
        out: Tensor = self.second(h * self.gamma if self.kind == "twice" else h)
        return out


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("number", "a constant map is computed in the code of"),
        ("computed", "a constant map is computed in the code of"),
        ("twice", "gamma has another use in"),
        ("positions", "its input is a sum or product of branches"),
    ],
)
def test_the_others_say_why(kind: str, reason: str) -> None:
    torch.manual_seed(0)
    model, x = Awkward(kind).double().eval(), torch.randn(2, 5, 4, dtype=torch.float64)
    gated, collapsed = check_chain(model, x)
    (gate,) = linearize.gates(gated).values()
    assert gate.site is not None
    assert reason in (gate.site.reason or "")
    assert collapsed.get_parameter("gamma").numel() == 8


def test_expressions_are_data() -> None:
    tensors = {"w": torch.tensor([1.0, 4.0]), "v": torch.tensor([3.0])}
    made = expression_of(["add", ["div", "w", ["sqrt", "w"]], ["mul", "v", 2]])
    assert names_in(made) == ("w", "w", "v")
    assert evaluate(made, tensors.__getitem__).tolist() == [7.0, 8.0]
    assert evaluate(made, tensors.__getitem__).dtype == torch.float64
    deep: Any = "w"
    for _ in range(100):
        deep = ["neg", deep]
    for odd in (["system", "w"], ["add", "w"], ["neg", "w", "w"], [["neg"], "w"], [], {"w": 1}, None, True, deep):
        with pytest.raises(ValueError, match="no constant that is known"):
            expression_of(odd)
    assert "rsqrt" in OPERATIONS


def test_sites_as_data() -> None:
    gated = linearize.convert(*made(*NETS["inline"], torch.float64))
    for gate in linearize.gates(gated).values():
        assert gate.site is not None
        assert Site.from_dict(gate.site.to_dict()) == gate.site
