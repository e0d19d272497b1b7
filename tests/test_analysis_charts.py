"""Every result of the laboratory prints a table, returns plain data, and has a picture; bad numbers are named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import linearize
from linearize.analysis import (
    CoreRecorder,
    TangentRecorder,
    class_separability,
    draw_symmetries,
    effective_rank,
    symmetry_table,
    tangent_kernel,
)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))


SAMPLES = torch.linspace(-1, 1, 60).reshape(20, 3)
LABELS = torch.arange(20) % 2


class Branching(nn.Module):
    """Control flow that depends on the data."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.first(x))
        return self.second(h if h.sum() > 0 else -h)


def written(path: Path) -> bool:
    return path.stat().st_size > 5000


def test_path_lengths(tmp_path: Path) -> None:
    found = linearize.average_path_length(network(), SAMPLES)
    found.draw(tmp_path / "a.png", "a network")
    assert written(tmp_path / "a.png")
    assert json.loads(json.dumps(found.to_dict()))["mean"] == 2


def test_functional_dimension(tmp_path: Path) -> None:
    found = linearize.functional_dimension(network(), SAMPLES)
    found.draw(tmp_path / "a.png")
    assert written(tmp_path / "a.png")
    assert json.dumps(found.to_dict())
    assert "functional dimension" in str(found)


def test_a_function_that_never_changes_has_a_picture_too(tmp_path: Path) -> None:
    net = network()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
    found = linearize.functional_dimension(net, torch.zeros(4, 3))
    found.draw(tmp_path / "a.png")
    assert written(tmp_path / "a.png")


def test_tangent_kernel(tmp_path: Path) -> None:
    net, recorder = network(), TangentRecorder(SAMPLES[:6])
    with pytest.raises(linearize.UsageError, match="record"):
        recorder.draw(tmp_path / "a.png")
    recorder.record(net)
    with torch.no_grad():
        next(net.parameters()).mul_(2)
    row = recorder.record(net)
    recorder.draw(tmp_path / "a.png")
    assert written(tmp_path / "a.png")
    assert len(str(recorder).splitlines()) == 4
    assert json.loads(json.dumps(recorder.to_dict()))["curve"][1]["distance"] == row["distance"]
    assert 1 <= row["effective_rank"] <= row["rank"] <= 12


def test_effective_rank_knows_how_even_a_spectrum_is() -> None:
    assert effective_rank(torch.diag(torch.tensor([1.0, 1.0, 0.0]))) == pytest.approx(2)
    assert 1 < effective_rank(torch.diag(torch.tensor([1.0, 0.1, 0.1]))) < 3
    assert effective_rank(torch.zeros(3, 3)) == 0


def test_core_curve_prints_and_returns_plain_data() -> None:
    recorder = CoreRecorder.of(linearize.convert(network(), SAMPLES[:1]))
    recorder.record(5, accuracy=0.5)
    assert "100.0%" in str(recorder)
    assert json.loads(json.dumps(recorder.to_dict()))["curve"][0]["accuracy"] == 0.5


def test_symmetries(tmp_path: Path) -> None:
    net = network()
    weight, bias, *_ = net.parameters()
    with torch.no_grad():
        bias[0], bias[1] = -9.0, 9.0
        weight[3], bias[3] = 2 * weight[2], 2 * bias[2]
    found = linearize.hidden_symmetries(net, SAMPLES, box=(-1, 1))
    draw_symmetries(found, tmp_path / "a.png", "planted")
    draw_symmetries([], tmp_path / "none.png")
    assert written(tmp_path / "a.png")
    assert written(tmp_path / "none.png")
    assert json.dumps([record.to_dict() for record in found])
    assert "inactive" in symmetry_table(found)


def test_separability(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    found = class_separability(network(), SAMPLES, LABELS)
    found.draw(tmp_path / "a.png")
    assert written(tmp_path / "a.png")
    assert json.dumps(found.to_dict())
    with pytest.raises(linearize.UsageError, match="cannot be written"):
        found.draw(tmp_path / "no" / "a.png")


def test_control_flow_that_depends_on_data_is_named_or_does_not_matter() -> None:
    net = Branching()
    with pytest.raises(linearize.CaptureError, match="cannot capture"):
        linearize.hidden_symmetries(net, SAMPLES)
    with pytest.raises(linearize.CaptureError, match="cannot capture"):
        class_separability(net, SAMPLES, LABELS)
    with pytest.raises(linearize.CaptureError, match="cannot capture"):
        CoreRecorder.of(net, SAMPLES)
    found = linearize.functional_dimension(net, SAMPLES)  # needs no captured graph, only a weaker bound
    assert found.bound == found.parameters == 26


def test_wrong_shapes_are_named() -> None:
    wrong = torch.zeros(4, 5)
    with pytest.raises(linearize.UsageError, match=r"shapes \[\(1, 5\)\]"):
        tangent_kernel(network(), wrong)
    with pytest.raises(linearize.CaptureError, match=r"shapes \[\(4, 5\)\]"):
        CoreRecorder.of(network(), wrong)


def test_a_kernel_too_large_says_how_large() -> None:
    with pytest.raises(linearize.UsageError, match=r"Jacobian of 40 x 122 numbers takes .* Gram matrix of 40 x 40"):
        tangent_kernel(network(), SAMPLES, memory=10_000)


def test_numbers_that_are_none_are_named() -> None:
    broken = SAMPLES.clone()
    broken[2, 1] = float("nan")
    with pytest.raises(linearize.DataError, match="Jacobian"):
        linearize.functional_dimension(network(), broken)
    with pytest.raises(linearize.DataError, match="Jacobian"):
        TangentRecorder(broken).record(network())
    with pytest.raises(linearize.DataError, match="1: found NaN"):
        linearize.hidden_symmetries(network(), broken)
    pytest.importorskip("sklearn")
    with pytest.raises(linearize.DataError, match="input: found NaN"):
        class_separability(network(), broken, LABELS)
