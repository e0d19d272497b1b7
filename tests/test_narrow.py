"""Chains through a depthwise map: channels of which only a constant is left leave all maps at once, exactly."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import linearize
from linearize.cost import cost
from linearize.errors import CollapseError
from linearize.plan import NARROWED, Plan
from linearize.surgery.form_choice import make_plan
from linearize.surgery.narrow import coupled_sites
from linearize.surgery.specs import all_steps
from tests.processors import assert_same_outputs, assert_same_tensors, moved, reordering


class Inverted(nn.Module):
    """Expand, depthwise, project, with norms; a shortcut where the shapes allow it."""

    def __init__(self, kernel: int = 3, stride: int = 1, *, act: type[nn.Module] = nn.ReLU6, padding: int = 1) -> None:
        super().__init__()
        self.expand = nn.Conv2d(4, 24, 1, bias=False)
        self.norm1, self.act1 = nn.BatchNorm2d(24), act()
        self.depthwise = nn.Conv2d(24, 24, kernel, stride, padding, groups=24, bias=False)
        self.norm2, self.act2 = nn.BatchNorm2d(24, eps=1e-3), act()
        self.project = nn.Conv2d(24, 4, 1)
        self.shortcut = stride == 1 and 2 * padding == kernel - 1

    def forward(self, x: Tensor) -> Tensor:
        h = self.act1(self.norm1(self.expand(x)))
        h = self.project(self.act2(self.norm2(self.depthwise(h))))
        return h + x if self.shortcut else h


def stirred(model: nn.Module) -> nn.Module:
    """Every parameter and statistic random: no number is 0 or 1 by accident."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            statistics: Any = module
            nn.init.uniform_(statistics.running_var, 0.5, 2)
            for tensor in (statistics.running_mean, module.weight, module.bias):
                nn.init.normal_(tensor)
    return model.double().eval()


def gated(model: nn.Module, example: Tensor, share: float = 0.5) -> nn.Module:
    """The model with a share of each activation's channels linear: some constant, some zero, some lines."""
    made = linearize.convert(model, example)
    for gate in linearize.gates(made).values():
        kind = torch.rand(gate.channels)
        with torch.no_grad():
            gate.slope.normal_()
            gate.intercept.normal_()
            gate.slope[kind < 0.6] = 0
            gate.intercept[kind < 0.2] = 0
        gate.linearize_(torch.rand(gate.channels) < share)
    return made.eval()


def error(model: nn.Module, reference: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        y = reference(x)
        return float((model(x) - y).abs().max() / y.abs().max())


@pytest.mark.parametrize("when", ["cheaper", "always"])
@pytest.mark.parametrize(
    "options", [{}, {"kernel": 5, "stride": 2, "padding": 2}, {"act": nn.Hardswish}, {"padding": 0}, {"act": nn.SiLU}]
)
def test_same_function(options: dict[str, object], when: str) -> None:
    torch.manual_seed(0)
    model, x = stirred(Inverted(**options)), torch.randn(2, 4, 9, 9, dtype=torch.float64)  # type: ignore[arg-type]
    for _ in range(4):
        made = gated(model, x)
        assert error(linearize.collapse(made, when=when), made, x) < 1e-12  # type: ignore[arg-type]
        assert error(made, model, x) > 1e-3  # negative control: the gates have changed the function


def test_every_map_is_narrower() -> None:
    torch.manual_seed(1)
    model, x = stirred(Inverted()), torch.randn(2, 4, 9, 9, dtype=torch.float64)
    made = linearize.convert(model, x)
    lower = linearize.gates(made)["act2"]
    with torch.no_grad():
        lower.slope.zero_()
        lower.intercept.fill_(0.7)
    lower.linearize_(torch.arange(24) % 3 == 0)
    small: Any = linearize.collapse(made)
    plan = {site.name: site for site in linearize.summary(made).sites}
    assert {plan["act1"].form, plan["act2"].form} == {NARROWED}
    assert (small.expand.out_channels, small.depthwise.groups, small.project.in_channels) == (16, 16, 16)
    assert isinstance(small.act1, nn.ReLU6)
    assert isinstance(small.act2, nn.ReLU6)
    assert cost(small, x).flops == pytest.approx(cost(model, x).flops * 2 / 3, rel=0.02)
    assert error(small, made, x) < 1e-12


def test_a_silent_first_activation_is_enough() -> None:
    torch.manual_seed(2)
    model, x = stirred(Inverted()), torch.randn(2, 4, 9, 9, dtype=torch.float64)
    made = linearize.convert(model, x)
    upper = linearize.gates(made)["act1"]
    with torch.no_grad():
        upper.slope.zero_()
        upper.intercept.zero_()
    upper.linearize_(torch.arange(24) < 8)
    small: Any = linearize.collapse(made)
    assert small.expand.out_channels == small.depthwise.groups == 16
    assert error(small, made, x) < 1e-12
    with torch.no_grad():
        upper.intercept.fill_(1.0)  # negative control: what is constant before the padding is not constant behind it
    small = linearize.collapse(made)
    assert small.depthwise.groups == 24


def test_dead_channels_of_a_trained_network_go() -> None:
    """Calibration finds channels that never are above zero: nothing changes on data like that."""
    torch.manual_seed(3)
    model: Any = stirred(Inverted())
    x = torch.randn(8, 4, 9, 9, dtype=torch.float64)
    with torch.no_grad():
        model.norm1.bias[:5] = -100.0
    made = linearize.convert(model, x)
    found = linearize.calibrate(made, [x], progress=False)
    for name, gate in linearize.gates(made).items():
        gate.linearize_(found.sites[name].residual <= 0)
    small: Any = linearize.collapse(made)
    assert small.depthwise.groups <= 19
    assert error(small, model, x) < 1e-12


def test_neighbours_in_a_stack() -> None:
    """The map between two blocks belongs to both: a site before or behind a chain changes it, too."""
    torch.manual_seed(4)
    stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, 1, 1, groups=8), nn.ReLU())
    middle = [nn.Conv2d(8, 16, 1), nn.ReLU(), nn.Conv2d(16, 16, 3, 2, 1, groups=16), nn.SiLU(), nn.Conv2d(16, 6, 1)]
    model = nn.Sequential(*stem, *middle, nn.ReLU(), nn.Conv2d(6, 5, 1)).double().eval()
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    assert len(coupled_sites(linearize.convert(model, x), ())) == 0
    for share in (0.3, 0.7, 0.95):
        made = gated(model, x, share)
        for when in ("cheaper", "always"):
            assert error(linearize.collapse(made, when=when), made, x) < 1e-12


@pytest.mark.slow
def test_saved_and_loaded_in_a_new_process(tmp_path: Path) -> None:
    torch.manual_seed(5)
    net = linearize.zoo.create("timm:mobilenetv2_050", in_chans=1, num_classes=4)
    x = torch.randn(2, 1, 32, 32)
    made = gated(stirred(net).float(), x)
    small = linearize.collapse(made)
    assert any(step["module"].get("groups", 1) < 48 for step in all_steps(small) if "conv_dw" in step["path"])
    linearize.save(small, tmp_path / "small.safetensors")
    torch.save(x, tmp_path / "x.pt")
    code = (
        f"import sys, linearize, torch; torch.set_num_threads({torch.get_num_threads()});"
        "from tests.processors import moved, other_sums; same = other_sums(); same.__enter__();"
        "folder, x = sys.argv[1], torch.load(sys.argv[1] + '/x.pt');"
        "m = linearize.load(folder + '/small.safetensors').eval();"
        "torch.save((m.state_dict(), moved(m)(x).detach(), m(x).detach()), folder + '/y.pt')"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=Path(__file__).parents[1], check=True)
    state, y, mapped = torch.load(tmp_path / "y.pt")
    assert state.keys() == small.state_dict().keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in small.state_dict().items())
    with torch.no_grad():
        expected = moved(small)(x)
    assert torch.equal(y, expected)
    assert (mapped - expected).abs().max() <= reordering(small, x.dtype) * expected.abs().max()


def test_plans_are_checked() -> None:
    torch.manual_seed(6)
    model, x = stirred(Inverted()), torch.randn(2, 4, 9, 9, dtype=torch.float64)
    made = linearize.convert(model, x)
    lower = linearize.gates(made)["act2"]
    with torch.no_grad():
        lower.slope.zero_()
    lower.linearize_(torch.arange(24) < 4)
    plan = make_plan(made)
    assert plan["act1"].dropped == plan["act2"].dropped == (0, 1, 2, 3)
    again = Plan.from_json(plan.to_json())
    assert error(linearize.collapse(made, plan=again), made, x) < 1e-12
    text = plan.to_json().replace("   3\n", "   3,\n    9\n")
    with pytest.raises(CollapseError, match=r"channel 9 is dropped|channel 9 is linear"):
        linearize.collapse(made, plan=Plan.from_json(text))


def test_compress_narrows_whole_chains() -> None:
    torch.manual_seed(7)
    model = nn.Sequential(*(Inverted(act=nn.SiLU) for _ in range(3))).eval()
    data = [torch.randn(16, 4, 12, 12) for _ in range(4)]
    result = linearize.compress(model, data, flops=0.5, rounds=0, cache=False, progress=False)
    assert result.report.outcome is not None
    assert result.report.outcome.met
    assert {site.form for site in result.plan.sites} & {NARROWED}
    assert result.report.verification is not None
    assert result.report.verification.passed
    again = linearize.compress(model, data, plan=result.plan, rounds=0, cache=False, progress=False)
    torch.testing.assert_close(again.model(data[0]), result.model(data[0]))


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_activations_work_in_place_again_once_collapsed(share: float, tmp_path: Path) -> None:
    """A gate must not overwrite its input; the activation alone may, where it did before."""
    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(3, 16, 1), nn.BatchNorm2d(16), nn.ReLU6(inplace=True), nn.Conv2d(16, 3, 1),
                         nn.ReLU(), nn.Conv2d(3, 3, 1)).double().eval()  # fmt: skip
    x = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    gated = linearize.convert(body, x)
    gate = linearize.gates(gated)["2"]
    gate.slope.zero_()
    gate.linearize_(torch.arange(16) < share * 16)
    small = linearize.collapse(gated)
    assert not gate.activation.inplace
    kinds = {type(module): module for module in small.modules()}
    assert (nn.ReLU6 in kinds) is (share < 1)
    if share < 1:
        assert kinds[nn.ReLU6].inplace
        assert not kinds[nn.ReLU].inplace
    with torch.no_grad():
        kept = x.clone()
        torch.testing.assert_close(small(x), gated(x), rtol=0, atol=1e-12)
        assert torch.equal(x, kept)
    small(x).sum().backward()
    assert all(p.grad is not None for p in small.parameters())
    linearize.save(small, tmp_path / "m.safetensors")
    loaded = linearize.load(tmp_path / "m.safetensors", model=copy.deepcopy(body))
    flags = [[getattr(module, "inplace", None) for module in model.modules()] for model in (loaded, small)]
    assert flags[0] == flags[1]
    assert_same_tensors(small, loaded)
    assert_same_outputs(small, loaded, lambda each: [each(x)])
