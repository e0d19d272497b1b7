"""Calibration: exact least squares in a stream, exact ends, padding, and data that cannot be used."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from linearize.algebra.moments import Moments
from linearize.calibrate import calibrate
from linearize.errors import DataError, UsageError
from linearize.gating.gate import ChannelGate


def gated(activation: nn.Module, channels: int = 4, **options: Any) -> ChannelGate:
    return ChannelGate(activation, channels, **options)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 99), st.lists(st.integers(1, 40), min_size=1, max_size=5), st.floats(-6, 6))
def test_the_line_is_that_of_least_squares(seed: int, sizes: list[int], shift: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    batches = [torch.randn(n, 3, dtype=torch.float64, generator=generator) + shift for n in [3, *sizes]]
    gate = gated(nn.GELU(), 3).double()
    site = calibrate(gate, batches).sites[""]
    x = torch.cat(batches)
    h = nn.functional.gelu(x)
    for c in range(3):
        matrix = np.stack([x[:, c].numpy(), np.ones(len(x))], 1)
        (slope, intercept), residual, *_ = np.linalg.lstsq(matrix, h[:, c].numpy(), rcond=None)
        assert site.slope[c].item() == pytest.approx(slope, rel=1e-6, abs=1e-8)
        assert site.intercept[c].item() == pytest.approx(intercept, rel=1e-6, abs=1e-8)
        assert site.residual[c].item() == pytest.approx(residual[0] / len(x), rel=1e-5, abs=1e-12)
        share = residual[0] / ((h[:, c] - h[:, c].mean()) ** 2).sum().item()
        assert site.unexplained[c].item() == pytest.approx(share, rel=1e-4, abs=1e-10)
    torch.testing.assert_close(gate.slope, site.slope)
    torch.testing.assert_close(gate.intercept, site.intercept)


def test_a_large_mean_costs_no_digits() -> None:
    x = torch.randn(1000, 1, dtype=torch.float64) + 1e6
    h = 0.3 * (x - 1e6) ** 3
    moments, whole = Moments(1), Moments(1)
    for part in range(10):
        moments.update(x[part * 100 : part * 100 + 100], h[part * 100 : part * 100 + 100])
    whole.update(x - 1e6, h)
    torch.testing.assert_close(moments.fit().slope, whole.fit().slope, rtol=1e-8, atol=0)
    torch.testing.assert_close(moments.fit().residual, whole.fit().residual, rtol=1e-8, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_channels_that_are_always_on_or_off_are_exact(dtype: torch.dtype) -> None:
    offset = torch.tensor([40.0, -40.0, 0.0, 1000.0]).to(dtype)
    batches = [torch.randn(64, 4).to(dtype) + offset for _ in range(7)]
    site = calibrate(gated(nn.ReLU()).to(dtype), batches).sites[""]
    assert site.slope[[0, 1, 3]].tolist() == [1, 0, 1]
    assert site.intercept[[0, 1, 3]].tolist() == [0, 0, 0]
    assert site.residual[[0, 1, 3]].tolist() == [0, 0, 0]
    assert site.unexplained[[0, 1, 3]].tolist() == [0, 0, 0]
    assert site.unexplained[2] > 0.1


def test_constant_inputs_are_answered_by_a_constant() -> None:
    x = torch.full((50, 2), 0.1) * torch.tensor([1.0, 3.0])
    site = calibrate(gated(nn.GELU(), 2), [x, x]).sites[""]
    assert site.slope.tolist() == [0, 0]
    torch.testing.assert_close(site.intercept.float(), nn.functional.gelu(x[0]))
    assert site.residual.tolist() == [0, 0]


def test_affine_activations_leave_nothing() -> None:
    site = calibrate(gated(nn.LeakyReLU(0.3)), [-torch.rand(99, 4) - 1] * 3).sites[""]
    torch.testing.assert_close(site.slope, torch.full((4,), 0.3, dtype=torch.float64), rtol=1e-5, atol=0)
    assert (site.unexplained < 1e-12).all()


def test_gated_units_get_their_mean() -> None:
    gate = gated(nn.SiLU(), gated_unit=True)
    x = torch.randn(500, 4)
    site = calibrate(gate, [x]).sites[""]
    h = nn.functional.silu(x.double())
    assert gate.slope.tolist() == [0] * 4
    torch.testing.assert_close(gate.intercept.double(), h.mean(0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(site.unexplained, h.var(0, correction=0) / h.square().mean(0), rtol=1e-4, atol=1e-6)


def test_channels_first_and_every_form_of_batch() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), gated(nn.GELU(), 4, axis=-3), nn.Dropout(0.5))
    x, y = torch.randn(8, 3, 5, 5), torch.zeros(8)
    statistics = model.get_buffer("1.running_mean").clone()
    found = [
        calibrate(model, [batch, batch]).sites["2"] for batch in (x, (x,), (x, y), [x, y], {"input": x, "labels": y})
    ]
    assert {site.count for site in found} == {2 * 8 * 25}
    for site in found[1:]:
        assert torch.equal(site.slope, found[0].slope)
    assert torch.equal(model.get_buffer("1.running_mean"), statistics), "it ran in training mode"
    assert model.training
    assert model[3].training


def test_a_generator_will_do_and_no_batch_will_not() -> None:
    gate = gated(nn.GELU())
    assert calibrate(gate, (torch.randn(5, 4) for _ in range(3))).sites[""].count == 15
    with pytest.raises(DataError, match="found no batches"):
        calibrate(gate, [])
    with pytest.raises(DataError, match="found no batches"):
        calibrate(gate, iter([]))
    with pytest.raises(DataError, match="type int"):
        calibrate(gate, [3])
    with pytest.raises(UsageError, match="convert"):
        calibrate(nn.Linear(2, 2), [torch.zeros(1, 2)])


class Encoder(nn.Module):
    """Takes tokens and a mask, as the models of transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 4)
        self.act = gated(nn.GELU())
        self.flat = gated(nn.GELU())

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.act(self.embed(input_ids))
        result: Tensor = self.flat(x.flatten(0, 1))
        return result


def test_padding_is_left_out() -> None:
    model = Encoder()
    ids = torch.randint(1, 10, (3, 7))
    mask = torch.arange(7).expand(3, 7) < torch.tensor([[7], [2], [4]])
    padded = {"input_ids": ids * mask, "attention_mask": mask.long(), "labels": torch.zeros(3)}
    found = calibrate(model, [padded])
    rows = [{"input_ids": ids[i : i + 1, :n]} for i, n in enumerate((7, 2, 4))]
    expected = calibrate(model, rows)
    for name in ("act", "flat"):
        assert found.sites[name].count == expected.sites[name].count == 13
        torch.testing.assert_close(found.sites[name].slope, expected.sites[name].slope)


def test_nan_names_the_site_and_changes_nothing() -> None:
    first, second = gated(nn.GELU()), nn.Linear(4, 4)
    model = nn.Sequential(nn.Linear(4, 4), first, second, gated(nn.GELU()))
    bad = torch.randn(5, 4)
    with torch.no_grad():
        second.weight[0, 0] = float("inf")
    with pytest.raises(DataError, match=r"^3: .*batch 0"):
        calibrate(model, [bad])
    bad[2, 1] = float("nan")
    with pytest.raises(DataError, match=r"^1: .*batch 1"):
        calibrate(nn.Sequential(*model[:2]), [torch.randn(5, 4), bad])
    assert first.slope.tolist() == [1] * 4
    assert not first.activation._forward_hooks


def test_linear_channels_keep_their_line_and_the_function_stays() -> None:
    gate = gated(nn.GELU()).linearize_(torch.tensor([True, False, False, False]))
    x = torch.randn(50, 4)
    before = gate(x)
    calibrate(gate, [x])
    assert gate.slope[0] == 1
    assert gate.slope[1] != 1
    assert torch.equal(gate(x), before)
    assert gate.alpha.tolist() == [1, 0, 0, 0]


def test_gates_that_are_not_reached() -> None:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = gated(nn.ReLU()), gated(nn.ReLU())

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.used(x)
            return result

    model = Half()
    found = calibrate(model, [torch.randn(5, 4)])
    assert found.sites["unused"].count == 0
    assert found.sites["unused"].unexplained.tolist() == [1] * 4
    assert model.unused.slope.tolist() == [1] * 4


def test_report() -> None:
    model = nn.Sequential(nn.Linear(3, 4), gated(nn.ReLU()))
    found = calibrate(model, [torch.randn(5, 3)])
    lines = str(found).splitlines()
    assert lines[0].split()[:2] == ["site", "channels"]
    assert lines[1].split()[:3] == ["1", "4", "5"]
    assert set(json.loads(json.dumps(found.to_dict()))["1"]) >= {"slope", "intercept", "residual", "unexplained"}
