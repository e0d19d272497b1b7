"""Channels that stopped between activation and line: told with their number, and rounded on request."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn

import linearize
from linearize.gating.gate import ChannelGate
from linearize.surgery.layers import BlendedActivation

X = torch.randn(16, 6, generator=torch.Generator().manual_seed(0))


def gated() -> nn.Module:
    torch.manual_seed(0)
    parts = [nn.Linear(6, 20), nn.ReLU(), nn.Linear(20, 20), nn.GELU(), nn.Linear(20, 3)]
    return linearize.convert(nn.Sequential(*parts).eval(), X)


def set_alphas(model: nn.Module, **values: list[float]) -> None:
    for name, alphas in values.items():
        gate = linearize.gates(model)[name.removeprefix("at_")]
        gate.alpha.data[: len(alphas)] = torch.tensor(alphas)


def test_the_count_and_the_remedy() -> None:
    model = gated()
    set_alphas(model, at_1=[0.2, 0.5, 1.0, 0.0], at_3=[0.9])
    linearize.gates(model)["1"].linearize_(torch.arange(20) == 1)  # frozen: decided, whatever its alpha
    with pytest.warns(UserWarning, match=r"^2 of 40 channels have an alpha.*at 1 \(1\), 3 \(1\): .*gate\.round_\(\)"):
        small = linearize.collapse(model)
    assert any(isinstance(module, BlendedActivation) for module in small.modules())
    assert linearize.verify(model, small, X)
    for gate in linearize.gates(model).values():
        gate.round_()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        small = linearize.collapse(model)
    assert not any(isinstance(module, BlendedActivation) for module in small.modules())
    assert linearize.verify(model, small, X)


def test_decided_channels_give_no_warning() -> None:
    model = gated()
    set_alphas(model, at_1=[1.0, 0.0], at_3=[0.0, 1.0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        linearize.collapse(model)


def test_parts_are_counted_once() -> None:
    whole = nn.Sequential(gated(), nn.Identity())
    linearize.gates(whole)["1"].alpha.data[0] = 0.5
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        linearize.collapse(whole)
    assert len(seen) == 1
    assert seen[0].filename == __file__


def test_averaged_weights_are_half_way_and_rounded() -> None:
    """An average of models before and after a channel went linear lies between; the prior's order is kept."""
    before, after = gated(), gated()
    mask = torch.arange(20) < 7
    linearize.gates(after)["1"].linearize_(mask)
    average = copy.deepcopy(before)
    for own, one, other in zip(average.parameters(), before.parameters(), after.parameters(), strict=True):
        own.data = 0.3 * one.data + 0.7 * other.data
    gate = linearize.gates(average)["1"]
    assert gate.half_way.tolist() == mask.tolist()
    gate.round_()
    assert gate.linear.tolist() == mask.tolist()
    assert gate.frozen.tolist() == mask.tolist()
    assert not gate.half_way.any()


def test_rounding_by_a_threshold() -> None:
    gate = ChannelGate(nn.ReLU(), 5)
    gate.alpha.data = torch.tensor([0.0, 0.1, 0.6, 0.9, 1.0])
    assert copy.deepcopy(gate).round_(0.95).alpha.tolist() == [0, 0, 0, 0, 1]
    assert copy.deepcopy(gate).round_(0.05).alpha.tolist() == [0, 1, 1, 1, 1]
    for odd in (-0.1, 1.5, float("nan")):
        with pytest.raises(linearize.UsageError, match="threshold"):
            gate.round_(odd)
