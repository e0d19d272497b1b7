"""original = gated = collapsed on networks that each hold one difficulty."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

import linearize
from linearize.surgery.form_choice import make_plan
from tests.chain import check_chain, error, outputs, randomize
from tests.toys import TOYS, make


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("when", ["always", "cheaper"])
@pytest.mark.parametrize("share", [0.5, 1.0])
@pytest.mark.parametrize("name", TOYS)
def test_chain(name: str, share: float, when: str, dtype: torch.dtype) -> None:
    model, inputs = make(name, dtype)
    gated, _ = check_chain(model, inputs, share, when=when)
    if when == "always":
        forms = tuple(site.form for site in make_plan(gated, when="always").sites)
        # fixed_width only shows when its forward runs: no shape tells that the code names the width.
        if name != "fixed_width":
            assert forms == (TOYS[name].forms if share < 1 else TOYS[name].all_linear)


@pytest.mark.parametrize("name", TOYS)
def test_model_passed_in_is_left_alone(name: str) -> None:
    model, inputs = make(name)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    modules = [(path, type(module)) for path, module in model.named_modules()]
    gated = linearize.convert(model, inputs)
    randomize(gated, 0.5)
    before = outputs(gated, inputs)
    linearize.collapse(gated, when="always")
    assert [(path, type(module)) for path, module in model.named_modules()] == modules
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
    assert all(torch.equal(a, b) for a, b in zip(before, outputs(gated, inputs), strict=True))
    assert set(state) <= set(gated.state_dict())


@pytest.mark.parametrize("name", TOYS)
def test_copies_keep_the_function(name: str) -> None:
    model, inputs = make(name)
    gated = linearize.convert(model, inputs)
    randomize(gated, 0.5)
    collapsed = linearize.collapse(gated, when="always")
    for rewritten in (gated, collapsed):
        expected = outputs(rewritten, inputs)
        assert error(expected, outputs(copy.deepcopy(rewritten), inputs)) == 0.0
        if not any(is_parametrized(module) for module in rewritten.modules()):  # torch refuses to pickle those
            again = pickle.loads(pickle.dumps(rewritten))  # noqa: S301 - our own bytes
            assert error(expected, outputs(again, inputs)) == 0.0
        twin = copy.deepcopy(rewritten)
        twin.load_state_dict(rewritten.state_dict())
        assert error(expected, outputs(twin, inputs)) == 0.0


@pytest.mark.parametrize("name", TOYS)
def test_collapsed_models_train(name: str) -> None:
    model, inputs = make(name)
    gated = linearize.convert(model, inputs)
    randomize(gated, 0.5)
    collapsed = linearize.collapse(gated).train()
    args, kwargs = ((), inputs) if isinstance(inputs, dict) else ((inputs,), {})
    out = collapsed(*args, **kwargs)
    total = sum(value.sum() for value in out.values()) if isinstance(out, dict) else out.sum()
    total.backward()
    missing = [n for n, p in collapsed.named_parameters() if p.grad is None]
    assert not missing


def test_conv_vanishes_into_plain_modules() -> None:
    model, inputs = make("conv_then_pointwise")
    gated = linearize.convert(model, inputs)
    randomize(gated, 1.0)
    collapsed = linearize.collapse(gated)
    assert [type(module) for module in collapsed.children()] == [nn.Conv2d, nn.Identity, nn.Identity]


def test_inverted_residual_becomes_one_dense_convolution() -> None:
    model, inputs = make("inverted_residual")
    gated = linearize.convert(model, inputs)
    randomize(gated, 1.0)
    collapsed = linearize.collapse(gated, when="always")
    left = [m for m in collapsed.children() if not isinstance(m, (nn.Identity, nn.BatchNorm2d, nn.Sequential))]
    assert len(left) == 1


def test_constant_and_identity_channels_change_nothing() -> None:
    """A dead ReLU channel has surrogate (0, 0), one that is always on (1, 0): both collapse without any change."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 5)).double().eval()
    first: nn.Linear = model[0]  # type: ignore[assignment]
    with torch.no_grad():
        first.bias[:4] = 100.0
        first.bias[4:8] = -100.0
    x = torch.randn(64, 6, dtype=torch.float64)
    gated = linearize.convert(model, x)
    linearize.calibrate(gated, [x])
    mask = torch.zeros(16, dtype=torch.bool)
    mask[:8] = True
    linearize.gates(gated)["1"].linearize_(mask)
    collapsed = linearize.collapse(gated, when="always")
    assert error(outputs(model, x), outputs(collapsed, x)) <= 1e-12


@pytest.mark.parametrize("name", ["mlp", "deep_mlp", "pointwise_then_padded", "packed_unit", "functional_activations"])
def test_a_collapsed_model_converts_again(name: str) -> None:
    """What one round leaves nonlinear, another can go on with: the gate then sits inside the partial activation."""
    model, inputs = make(name, torch.float64)
    gated = linearize.convert(model, inputs)
    randomize(gated, 0.3)
    once = linearize.collapse(gated, when="always")
    again = linearize.convert(once, inputs)
    assert error(outputs(once, inputs), outputs(again, inputs)) == 0.0
    randomize(again, 0.5, seed=1)
    moved = outputs(again, inputs)
    assert error(outputs(once, inputs), moved) > 1e-10
    twice = linearize.collapse(again, when="always")
    assert error(moved, outputs(twice, inputs)) <= 1e-12
