"""Priors: their value and gradient, the way to an exact share, and what a resumed run needs of them."""

from __future__ import annotations

import copy
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from linearize.calibrate import calibrate
from linearize.collapse import collapse
from linearize.convert import convert
from linearize.errors import TrainingError, UsageError
from linearize.gating.gate import ChannelGate, gates
from linearize.sites.site import Site
from linearize.surgery.carriers import Around
from linearize.training.compete import SCHEDULES
from linearize.training.priors import SparsityPrior, param_groups
from linearize.verify import verify


def network(*widths: int, saved: tuple[float, ...] = (), reason: str | None = None) -> nn.Sequential:
    """Linear layers with a gate of each width between them; `saved` gives the gates sites with these costs."""
    layers: list[nn.Module] = []
    before = 3
    for index, width in enumerate(widths):
        site = None
        if saved:
            name = f"act{index}"
            site = Site(name, name, "relu", width, -1, index, 1, saved=saved[index], reason=reason)
        layers += [nn.Linear(before, width), ChannelGate(nn.ReLU(), width, site=site)]
        before = width
    return nn.Sequential(*layers, nn.Linear(before, 2))


def set_alpha(model: nn.Module, *values: list[float]) -> None:
    with torch.no_grad():
        for gate, row in zip(gates(model).values(), values, strict=True):
            gate.alpha.copy_(torch.tensor(row))


def linear_channels(model: nn.Module) -> list[bool]:
    return [flag for gate in gates(model).values() for flag in gate.linear.tolist()]


def test_value_of_the_papers_prior() -> None:
    model = network(2, 2)
    set_alpha(model, [0.0, 0.75], [0.51, 1.0])
    gates(model)["3"].linearize_(torch.tensor([False, True]))
    assert SparsityPrior(model, kind="paper", weight=2.0)().item() == pytest.approx(2 * (1 + 0.5 + 0.7))
    assert SparsityPrior(model, kind="paper", weight=1.0, p=1)().item() == pytest.approx(1 + 0.25 + 0.49)


def test_value_of_the_folding_prior() -> None:
    model = network(3)
    set_alpha(model, [0.0, 0.5, 1.0])
    assert SparsityPrior(model, kind="folding", weight=2.0)().item() == pytest.approx(2 * 1.75)


@pytest.mark.parametrize("kind", ["paper", "folding"])
def test_the_gradient_is_finite_and_draws_towards_one(kind: Any) -> None:
    model = network(4)
    set_alpha(model, [0.01, 0.5, 0.9999999, 1.0])
    gate = gates(model)["1"]
    gate.linearize_(torch.tensor([False, False, False, True]))
    SparsityPrior(model, kind=kind, weight=1.0)().backward()
    assert gate.alpha.grad is not None
    assert gate.alpha.grad.isfinite().all()
    assert (gate.alpha.grad[:2] < 0).all()
    assert gate.alpha.grad[3] == 0


def test_step_projects_and_freezes_those_that_arrived() -> None:
    model = network(4)
    set_alpha(model, [-0.5, 0.9, 0.9995, 1.5])
    SparsityPrior(model).step()
    gate = gates(model)["1"]
    assert gate.alpha.tolist() == pytest.approx([0, 0.9, 1, 1])
    assert gate.frozen.tolist() == [False, False, True, True]
    set_alpha(model, [0, 0, 0, 0])  # as an optimizer with momentum may do
    SparsityPrior(model).step()
    assert gate.alpha.tolist() == [0, 0, 1, 1]


@settings(max_examples=60, deadline=None)
@given(
    target=st.floats(0.01, 1),
    steps=st.integers(1, 40),
    schedule=st.sampled_from(sorted(SCHEDULES)),
    ramp=st.floats(0, 0.9),
    frozen=st.integers(0, 3),
    seed=st.integers(0, 9),
)
def test_any_target_is_reached_exactly(
    target: float, steps: int, schedule: str, ramp: float, frozen: int, seed: int
) -> None:
    torch.manual_seed(seed)
    model = network(5, 7, 11)
    gates(model)["3"].linearize_(torch.arange(7) < frozen)
    wanted = int(target * 23 + 0.5)
    if wanted < frozen:
        with pytest.raises(UsageError, match="frozen already"):
            SparsityPrior(model, kind="target", target=target, steps=steps)
        return
    prior = SparsityPrior(model, kind="target", target=target, steps=steps, schedule=schedule, ramp=ramp)
    shares = [prior.share]
    for _ in range(steps + 3):
        with torch.no_grad():
            for gate in prior.gates:  # an optimizer that goes anywhere
                gate.alpha.add_(torch.randn_like(gate.alpha))
        prior.step()
        shares.append(prior.share)
    assert all(later >= earlier for earlier, later in pairwise(shares))
    assert sum(linear_channels(model)) == wanted
    assert shares[steps] == pytest.approx(wanted / 23)
    for gate in prior.gates:
        assert set(gate.alpha.tolist()) <= {0.0, 1.0}
        assert torch.equal(gate.frozen, gate.alpha == 1)


def test_layers_compete_and_the_highest_alpha_wins() -> None:
    model = network(3, 3)
    set_alpha(model, [0.1, 0.5, 0.2], [0.6, 0.0, 0.4])
    prior = SparsityPrior(model, kind="target", target=0.5, steps=4)
    for _ in range(4):
        prior.step()
    assert linear_channels(model) == [False, True, False, True, False, True]


def test_winners_are_led_not_thrown() -> None:
    model = network(10)
    prior = SparsityPrior(model, kind="target", target=1.0, steps=100, schedule="linear", ramp=0.5)
    largest, before = 0.0, gates(model)["1"].alpha.detach().clone()
    for _ in range(100):
        prior.step()
        now = gates(model)["1"].alpha.detach().clone()
        largest = max(largest, float((now - before).max()))
        before = now
    assert linear_channels(model) == [True] * 10
    assert largest == pytest.approx(1 / 50, rel=1e-4)


def test_a_share_of_the_cost() -> None:
    model = network(4, 4, saved=(1.0, 100.0))
    prior = SparsityPrior(model, kind="target", target=0.5, steps=3, by="cost")
    for _ in range(3):
        prior.step()
    cost = sum(flag * (1 if i < 4 else 100) for i, flag in enumerate(linear_channels(model)))
    assert 0.5 * 404 <= cost < 0.5 * 404 + 100


def test_cost_weights_decide_between_equals() -> None:
    model = network(3, 3, saved=(1.0, 5.0))
    set_alpha(model, [0.5, 0.5, 0.5], [0.4, 0.4, 0.4])
    prior = SparsityPrior(model, kind="target", target=0.5, steps=1, cost_weighted=True)
    assert SparsityPrior(model, kind="folding", weight=1.0, cost_weighted=True)().item() == pytest.approx(
        3 * 0.75 * (1 / 3) + 3 * 0.84 * (5 / 3)
    )
    prior.step()
    assert linear_channels(model) == [False] * 3 + [True] * 3


def test_calibration_gives_a_head_start() -> None:
    model = network(4)
    with torch.no_grad():
        model.get_parameter("0.bias").copy_(torch.tensor([0.0, 50.0, 0.0, -50.0]))  # 1 is always on, 3 off
    found = calibrate(model, [torch.randn(100, 3)])
    prior = SparsityPrior(model, kind="target", target=0.5, steps=1, calibration=found)
    prior.step()
    assert linear_channels(model) == [False, True, False, True]
    with pytest.raises(UsageError, match="number of channels"):
        SparsityPrior(network(5), kind="target", target=0.5, steps=1, calibration=found)
    with pytest.raises(UsageError, match="calibration"):
        SparsityPrior(network(4, 4), kind="target", target=0.5, steps=1, calibration=found)


def wander(model: nn.Module, prior: SparsityPrior, steps: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        with torch.no_grad():
            for gate in prior.gates:
                gate.alpha.add_(0.3 * torch.randn(gate.channels, generator=generator))
        prior.step()


@pytest.mark.parametrize("options", [{"kind": "paper"}, {"kind": "target", "target": 0.7, "steps": 20}])
def test_state_continues_in_a_new_object(options: dict[str, Any]) -> None:
    model = network(5, 6)
    prior = SparsityPrior(model, **options)
    wander(model, prior, 9, seed=1)
    state, twin = copy.deepcopy(prior.state_dict()), copy.deepcopy(model)
    wander(model, prior, 11, seed=2)
    resumed = SparsityPrior(twin, **options)
    resumed.load_state_dict(state)
    wander(twin, resumed, 11, seed=2)
    for mine, its in zip(gates(model).values(), gates(twin).values(), strict=True):
        assert torch.equal(mine.alpha, its.alpha)
        assert torch.equal(mine.frozen, its.frozen)


def test_state_of_another_prior() -> None:
    state = SparsityPrior(network(5), kind="target", target=0.5, steps=2).state_dict()
    with pytest.raises(TrainingError, match="kind"):
        SparsityPrior(network(5)).load_state_dict(state)
    with pytest.raises(TrainingError, match="5 channels"):
        SparsityPrior(network(6), kind="target", target=0.5, steps=2).load_state_dict(state)


@pytest.mark.parametrize(
    "options",
    [
        {"kind": "magic"},
        {"weight": -1.0},
        {"weight": float("nan")},
        {"p": 0.0},
        {"tolerance": 0.0},
        {"target": 0.5},
        {"kind": "folding", "steps": 5},
        {"kind": "target"},
        {"kind": "target", "target": 0.5},
        {"kind": "target", "target": 0.0, "steps": 5},
        {"kind": "target", "target": 60, "steps": 5},
        {"kind": "target", "target": 0.5, "steps": 0},
        {"kind": "target", "target": 0.5, "steps": 5, "schedule": "soon"},
        {"kind": "target", "target": 0.5, "steps": 5, "ramp": 1.0},
        {"kind": "target", "target": 0.5, "steps": 5, "by": "weight"},
        {"kind": "target", "target": 0.5, "steps": 5, "by": "cost"},
        {"cost_weighted": True},
        {"together": "layers"},
        {"kind": "target", "target": 0.5, "steps": 5, "together": "blocks"},
    ],
    ids=str,
)
def test_bad_arguments(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        SparsityPrior(network(5), **options)


@pytest.mark.parametrize("together", ["sites", "blocks"])
def test_whole_sites_and_whole_blocks_become_linear_together(together: Any) -> None:
    torch.manual_seed(0)
    block = nn.Conv2d(2, 12, 1), nn.ReLU6(), nn.Conv2d(12, 12, 3, padding=1, groups=12), nn.ReLU6(), nn.Conv2d(12, 2, 1)
    x = torch.randn(4, 2, 6, 6).double()
    model = convert(nn.Sequential(*block, nn.Flatten(), nn.Linear(72, 9), nn.GELU(), nn.Linear(9, 2)).double(), x)
    prior = SparsityPrior(model, kind="paper", weight=0.1, together=together)
    optimizer = torch.optim.AdamW(param_groups(model, gate_lr=0.02))
    shares = []
    for _ in range(120):
        optimizer.zero_grad()
        ((model(x) - 1).square().mean() + prior()).backward()
        optimizer.step()
        prior.step()
        first, second, _ = (gate.alpha.detach() for gate in gates(model).values())
        assert len(first.unique()) == 1
        assert together == "sites" or torch.equal(first, second)
        shares.append(prior.share)
    assert shares[-1] == 1
    assert set(shares) <= ({0, 24 / 33, 9 / 33, 1} if together == "blocks" else {0, *shares})
    small = collapse(model.eval(), when="always")
    kinds = [type(module) for module in small.modules()]
    assert nn.ReLU6 not in kinds
    layers = [module for module in small.children() if isinstance(module, (nn.Conv2d, Around))]
    assert len(layers) == 1  # the whole block is one convolution
    assert verify(model, small, x).max_error < 1e-12


def test_no_gates_and_no_cost() -> None:
    with pytest.raises(UsageError, match="convert"):
        SparsityPrior(nn.Linear(2, 2))
    with pytest.raises(UsageError, match="no channel that saves cost"):
        SparsityPrior(network(2, saved=(5.0,), reason="no consumer"), cost_weighted=True)


def test_param_groups_hold_everything_once() -> None:
    model = network(4)
    model.append(nn.LayerNorm(2))
    model.append(nn.PReLU(2))
    model.append(model[0])  # tied
    model[2].weight.requires_grad_(False)
    groups = {group["name"]: group for group in param_groups(model, lr=1.0, gate_lr=2.0, weight_decay=3.0)}
    ids = [id(p) for group in groups.values() for p in group["params"]]
    assert sorted(ids) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    assert {name: (g["lr"], g["weight_decay"]) for name, g in groups.items()} == {
        "decay": (1.0, 3.0),
        "plain": (1.0, 0.0),
        "gates": (2.0, 0.0),
    }
    assert all(p.dim() >= 2 for p in groups["decay"]["params"])
    assert [id(p) for p in groups["gates"]["params"]] == [id(gates(model)["1"].alpha)]
    torch.optim.AdamW(list(groups.values()))


def test_param_groups_bad_input() -> None:
    with pytest.raises(UsageError, match="gate_lr"):
        param_groups(network(2), 1e-3, -1.0, 0.0)
    with pytest.raises(UsageError, match="no parameter"):
        param_groups(nn.Linear(2, 2).requires_grad_(False), 1e-3, 1e-3, 0.0)


def test_the_lines_of_a_loop_of_ones_own() -> None:
    model = network(16, 16)
    x = torch.randn(256, 3)
    y = (x[:, 0] > x[:, 1]).long()
    prior = SparsityPrior(model, kind="target", target=0.75, steps=60)
    optimizer = torch.optim.AdamW(param_groups(model, lr=1e-2, gate_lr=1e-2, weight_decay=0.05))
    for _ in range(60):
        loss = nn.functional.cross_entropy(model(x), y) + prior()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        prior.step()
    assert prior.share == 0.75
    assert (model(x).argmax(-1) == y).float().mean() > 0.95
