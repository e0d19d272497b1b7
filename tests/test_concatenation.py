"""Channels behind a concatenation: the consumer's columns are split by branch, exactly, borders included."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import linearize
from linearize.surgery.form_choice import make_plan
from tests.chain import check_chain, error, made, outputs, randomize


def block(inputs: int, width: int, kernel: int = 1, *, act: type[nn.Module] = nn.ReLU, **options: Any) -> nn.Module:
    conv = nn.Conv2d(inputs, width, kernel, padding=kernel // 2, bias=False, **options)
    norm = nn.BatchNorm2d(width)
    nn.init.uniform_(norm.weight, 0.5, 1.5)
    nn.init.normal_(norm.bias)
    norm.running_mean, norm.running_var = torch.randn(width), torch.rand(width) + 0.5
    return nn.Sequential(conv, norm, act())


class Inception(nn.Module):
    """Branches of several widths into one tensor, which several maps read: pointwise, spatial, and behind a pool."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = block(3, 40), nn.Sequential(block(3, 6), block(6, 5, 3))
        self.three = nn.Sequential(nn.AvgPool2d(3, 1, 1, count_include_pad=False), block(3, 7, act=nn.SiLU))
        self.point, self.spatial, self.pooled = nn.Conv2d(52, 4, 1), nn.Conv2d(52, 3, 3, padding=1), nn.Conv2d(52, 2, 1)
        self.pool = nn.AvgPool2d(2)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        h = torch.cat([self.one(x), self.two(x), self.three(x)], 1)
        return self.point(h), self.spatial(h), self.pooled(self.pool(h))


class Points(nn.Module):
    """Two branches; `first` says in which order they come."""

    def __init__(self, *, taps: int = 1, kernel: int = 1, first: bool = True, stride: int = 1) -> None:
        super().__init__()
        self.first = first
        self.wide, self.other = block(3, 40, taps), block(3, 9, 3, act=nn.GELU)
        self.out = nn.Conv2d(49, 4, kernel, padding=kernel // 2, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        parts = [self.wide(x), self.other(x)]
        out: Tensor = self.out(torch.cat(parts if self.first else parts[::-1], dim=1))
        return out


class Dense(nn.Module):
    """A norm between concatenation and consumer, over all branches; one branch is read again further down."""

    def __init__(self, kernel: int = 1) -> None:
        super().__init__()
        self.one, self.two, self.three = block(3, 20), block(3, 6, 3), block(26, 5)
        self.inner, self.outer = nn.BatchNorm2d(26), nn.BatchNorm2d(34)
        for norm in (self.inner, self.outer):
            nn.init.normal_(norm.weight)
            nn.init.normal_(norm.bias)
            norm.running_var = torch.rand(norm.num_features) + 0.5
        self.out = nn.Conv2d(34, 4, kernel, padding=kernel // 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.inner(torch.cat([self.one(x), self.two(x)], 1))
        out: Tensor = self.out(self.outer(torch.cat([x, h, self.three(h)], dim=1)))
        return out


class Twice(nn.Module):
    """The same branch twice in one concatenation, once pooled; and a concatenation inside of another."""

    def __init__(self, *, steady: bool = False) -> None:
        super().__init__()
        self.one, self.two = block(3, 8), block(3, 4)
        self.pool = nn.AvgPool2d(3, 1, 1, count_include_pad=not steady)
        self.norm = nn.BatchNorm2d(8)
        self.norm.running_mean = torch.randn(8) if steady else torch.zeros(8)
        self.out = nn.Conv2d(31, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.one(x)
        inner = torch.cat((self.two(x), self.norm(h)), 1)
        out: Tensor = self.out(torch.cat((h, inner, x, self.pool(h)), 1))
        return out


class Halves(nn.Module):
    """Taken apart behind the activation and put together again, with what is made of the last part (C2f, CSP)."""

    def __init__(self, *, kernel: int = 1, parts: int = 2, sliced: bool = False) -> None:
        super().__init__()
        self.parts, self.sliced = parts, sliced
        self.first = block(3, 24, act=nn.SiLU)
        self.inner = nn.ModuleList([self.bottleneck(24 // parts), self.bottleneck(24 // parts)])
        self.last = nn.Conv2d(24 + 2 * 24 // parts, 4, kernel, padding=kernel // 2)

    @staticmethod
    def bottleneck(width: int) -> nn.Module:
        return nn.Sequential(block(width, 6, 3, act=nn.SiLU), block(6, width, 3, act=nn.SiLU))

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        y = list(h.chunk(self.parts, 1)) if not self.sliced else []
        if self.sliced:
            y = [h[:, : h.shape[1] // 2], h[:, h.shape[1] // 2 :]]
        y.extend(part(y[-1]) for part in self.inner)
        out: Tensor = self.last(torch.cat(y, 1))
        return out


class Rows(nn.Module):
    """Matrices: features of tokens beside one another, one branch a gated unit."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.gate, self.one = nn.Linear(4, 24), nn.Linear(4, 24), nn.Linear(4, 30)
        self.out, self.head = nn.Linear(54, 3), nn.Linear(30, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = functional.gelu(self.one(x))
        gated = functional.silu(self.gate(x)) * self.up(x)
        return self.out(torch.cat((gated, h), dim=-1)), self.head(h)


class Ghost(nn.Module):
    """Cheap features from a depthwise map of the others; what is behind is cut to the width that is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.primary, self.cheap = block(3, 6), block(6, 6, 3, groups=6)
        self.out = nn.Conv2d(12, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.primary(x)
        both = torch.cat([h, self.cheap(h)], dim=1)
        out: Tensor = self.out(both[:, :12])
        return out


class Flat(nn.Module):
    """Pooled, flattened, and into a matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.head = block(3, 12), block(3, 8, 3), nn.Linear(20, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.cat((self.one(x), self.two(x)), 1)
        out: Tensor = self.head(functional.adaptive_avg_pool2d(h, 1).flatten(1))
        return out


IMAGE, TOKENS = (2, 3, 9, 7), (2, 5, 4)
NETS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "inception": (Inception, IMAGE),
    "pointwise": (Points, IMAGE),
    "pointwise, wide one last": (lambda: Points(first=False), IMAGE),
    "three by three": (lambda: Points(taps=3, first=False), IMAGE),
    "strided": (lambda: Points(stride=2), IMAGE),
    "spatial": (lambda: Points(kernel=3), IMAGE),
    "dense": (Dense, IMAGE),
    "dense, spatial": (lambda: Dense(3), IMAGE),
    "twice": (Twice, IMAGE),
    "twice, steady": (lambda: Twice(steady=True), IMAGE),
    "halves": (Halves, IMAGE),
    "halves, spatial": (lambda: Halves(kernel=3), IMAGE),
    "quarters": (lambda: Halves(parts=4), IMAGE),
    "sliced": (lambda: Halves(sliced=True), IMAGE),
    "rows": (Rows, TOKENS),
    "ghost": (Ghost, IMAGE),
    "flat": (Flat, IMAGE),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("when", ["always", "cheaper"])
@pytest.mark.parametrize("share", [0.5, 0.9, 1.0])
@pytest.mark.parametrize("name", NETS)
@pytest.mark.slow
def test_same_function(name: str, share: float, when: str, dtype: torch.dtype) -> None:
    model, x = made(*NETS[name], dtype)
    gated, _ = check_chain(model, x, share, when=when)
    assert all(gate.site is not None and gate.site.reason is None for gate in linearize.gates(gated).values())


@pytest.mark.parametrize("name", NETS)
def test_saved_loaded_and_trained(name: str, tmp_path: Path) -> None:
    model, x = made(*NETS[name], torch.float64)
    gated = linearize.convert(model, x)
    randomize(gated, 0.6)
    collapsed = linearize.collapse(gated, when="always")
    linearize.save(collapsed, tmp_path / "small.safetensors")
    loaded = linearize.load(tmp_path / "small.safetensors", model=made(*NETS[name], torch.float64)[0])
    state = collapsed.state_dict()
    assert state.keys() == loaded.state_dict().keys()
    assert all(torch.equal(state[key], value) for key, value in loaded.state_dict().items())
    assert error(outputs(gated, x), outputs(loaded, x)) <= 1e-12
    found = loaded.train()(x)
    sum(part.square().mean() for part in (found if isinstance(found, tuple) else (found,))).backward()
    assert all(p.grad is not None for p in loaded.parameters() if p.numel())


@pytest.mark.parametrize("name", NETS)
@pytest.mark.slow
def test_each_branch_alone(name: str) -> None:
    """One site linear at a time, and each pair: the columns of the others stay what they were."""
    model, x = made(*NETS[name], torch.float64)
    gated = linearize.convert(model, x)
    names = list(linearize.gates(gated))
    for chosen in [{a, b} for a in names for b in names]:
        twin = copy.deepcopy(gated)
        randomize(twin, 0.7)
        for other in set(names) - chosen:
            gate = linearize.gates(twin)[other]
            gate.linearize_(torch.zeros(gate.channels, dtype=torch.bool))
            gate.frozen.zero_()
            gate.alpha.data.zero_()
        moved = outputs(twin, x)
        assert error(outputs(gated, x), moved) > 1e-6
        assert error(moved, outputs(linearize.collapse(twin, when="always"), x)) <= 1e-12


def forms(model: nn.Module, x: Tensor, share: float) -> dict[str, str]:
    gated = linearize.convert(model, x)
    randomize(gated, share)
    return {site.site: site.form for site in make_plan(gated, when="always").sites}


def test_what_is_chosen() -> None:
    model, x = made(*NETS["pointwise"], torch.float64)
    assert forms(model, x, 0.5) == {"wide.2": "merged (input)", "other.2": "merged"}
    assert forms(model, x, 1.0) == {"wide.2": "merged", "other.2": "merged"}
    model, x = made(*NETS["spatial"], torch.float64)
    assert forms(model, x, 0.5) == {"wide.2": "merged (input)", "other.2": "factored"}


def test_what_is_carried_is_added_by_the_layer_or_by_columns_of_the_identity() -> None:
    torch.manual_seed(0)
    for first in (True, False):
        model, x = Points(taps=3, first=first).double().eval(), torch.randn(IMAGE, dtype=torch.float64)
        gated = linearize.convert(model, x)
        gate = linearize.gates(gated)["wide.2"]
        gate.linearize_(torch.arange(40) < 30)
        plan = make_plan(gated, when="cheaper")
        assert (plan["wide.2"].form, plan["wide.2"].after < plan["wide.2"].before) == ("merged", True)
        small = linearize.collapse(gated)
        assert error(outputs(gated, x), outputs(small, x)) <= 1e-12
        weight = small.get_parameter("out.weight")
        if first:  # ten channels stay, four are carried, nine are of the other branch
            assert weight.shape == (4, 10 + 4 + 9, 1, 1)
            assert torch.equal(weight[:, 10:14, 0, 0], torch.eye(4, dtype=torch.float64))
        else:  # at the end: no column is needed
            assert weight.shape == (4, 9 + 10, 1, 1)


def test_a_norm_over_all_branches_is_folded_once() -> None:
    model, x = made(*NETS["dense"], torch.float64)
    gated, collapsed = check_chain(model, x)
    assert isinstance(collapsed.get_submodule("inner"), nn.Identity)
    assert isinstance(collapsed.get_submodule("outer"), nn.Identity)
    folds = [g.site.consumer_folds for g in linearize.gates(gated).values() if g.site is not None]
    assert [len(found) for found in folds] == [2, 2, 1]


class Cut(nn.Module):
    """Code that names a width inside the concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.out = block(3, 16), block(3, 12), nn.Conv2d(28, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.cat((self.one(x), self.two(x)), 1)
        out: Tensor = self.out(h.view(-1, 28, 9, 7))
        return out


def test_a_width_named_in_the_code_keeps_a_partial_activation() -> None:
    torch.manual_seed(0)
    gated, collapsed = check_chain(Cut().double().eval(), torch.randn(IMAGE, dtype=torch.float64), 0.8)
    assert len(linearize.gates(gated)) == 2
    assert tuple(collapsed.get_parameter("out.weight").shape) == (3, 28, 1, 1)


class Redundant(nn.Module):
    """Two branches whose channels repeat one another, shifted by constants: half of them can be refitted away."""

    def __init__(self, *, norm: bool) -> None:
        super().__init__()
        self.wide, self.other = nn.Conv2d(3, 24, 3, padding=1), nn.Conv2d(3, 16, 1)
        self.norm = nn.BatchNorm2d(40) if norm else nn.Identity()
        self.act, self.act2, self.out = nn.ReLU(), nn.ReLU(), nn.Conv2d(40, 6, 1)
        if norm:
            nn.init.normal_(self.norm.bias)  # type: ignore[arg-type]
        with torch.no_grad():
            for conv in (self.wide, self.other):
                half = conv.out_channels // 2
                conv.weight[half:] = 2 * conv.weight[:half]
                conv.bias[half:] = 2 * conv.bias[:half]  # type: ignore[index]

    def forward(self, x: Tensor) -> Tensor:
        h = torch.cat((self.act(self.wide(x)), self.act2(self.other(x))), 1)
        out: Tensor = self.out(self.norm(h)).flatten(1)
        return out


@pytest.mark.parametrize("norm", [False, True], ids=["plain", "with a norm"])
def test_budgets_edit_branches(norm: bool) -> None:
    torch.manual_seed(0)
    model = Redundant(norm=norm).eval()
    data = [(torch.randn(4, 3, 8, 8),) for _ in range(6)]
    result = linearize.compress(model, data, flops=0.52)
    assert result.report.after.flops <= 0.52 * result.report.before.flops
    widths = [result.model.get_parameter(f"{name}.weight").shape[0] for name in ("wide", "other")]
    assert widths[0] < 24
    assert widths[1] < 16
    assert error(outputs(model, data[0]), outputs(result.model, data[0])) < 5e-3  # the ridge of the regression


def test_what_budgets_leave_alone_says_why() -> None:
    from linearize.families.channels.editable import obstacle_to_refit

    for name, reason in (("halves", "taken apart"), ("twice", "two places")):
        gated = linearize.convert(*made(*NETS[name], torch.float64))
        found = [obstacle_to_refit(gated, gate.site) or "" for gate in linearize.gates(gated).values()]
        assert any(reason in why for why in found)


def test_code_that_cuts_what_is_wider() -> None:
    """A branch may only become narrower then: forms that leave it so are taken, and no others."""
    torch.manual_seed(0)
    model, x = Ghost().double().eval(), torch.randn(IMAGE, dtype=torch.float64)
    for share, some in ((0.5, False), (0.9, True)):
        gated, collapsed = check_chain(model, x, share)
        wide, narrow = (
            [site.form.startswith("merged") for site in make_plan(gated, when="always", widen=widen).sites]
            for widen in (True, False)
        )
        assert all(wide)
        assert any(narrow) == some
        assert collapsed.get_parameter("out.weight").shape[1] <= 12
