"""Every result of the laboratory prints a table, returns plain data, and has a picture; bad numbers are named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

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
from tests.fixtures import heights, labels, values, widths


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
    return path.read_bytes().startswith(b"\x89PNG")


def test_path_lengths(tmp_path: Path, drawn: list[Any]) -> None:
    found = linearize.average_path_length(network(), SAMPLES)
    found.draw(tmp_path / "a.png", "a network")
    assert written(tmp_path / "a.png")
    (axes,) = drawn[0].axes
    assert heights(axes) == pytest.approx([0, 0, 100])  # every path holds both units
    assert [float(x) for x in axes.lines[0].get_xdata()] == [2, 2]
    assert labels(axes) == ("nonlinear units on a path", f"paths, % ({found.weighting})")
    assert axes.get_title(loc="left") == "a network: average path length 2.00"
    assert json.loads(json.dumps(found.to_dict()))["mean"] == 2


def test_functional_dimension(tmp_path: Path, drawn: list[Any]) -> None:
    found = linearize.functional_dimension(network(), SAMPLES)
    found.draw(tmp_path / "a.png")
    assert written(tmp_path / "a.png")
    left, right = drawn[0].axes
    assert (labels(left), labels(right)) == (("samples", "rank"), ("index", "singular value"))
    assert values(left.lines[0]) == [rank for _, rank in found.batches]
    assert values(left.lines[1]) == [found.bound] * 2
    assert values(right.lines[0]) == pytest.approx(found.spectrum.tolist())
    assert values(right.lines[1]) == [found.tolerance] * 2
    assert left.get_title(loc="left") == f"functional dimension {found.rank} of {found.parameters}"
    assert json.dumps(found.to_dict())
    assert "functional dimension" in str(found)


def test_a_function_that_never_changes_has_a_picture_too(tmp_path: Path, drawn: list[Any]) -> None:
    net = network()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
    found = linearize.functional_dimension(net, torch.zeros(4, 3))
    found.draw(tmp_path / "a.png")
    assert written(tmp_path / "a.png")
    left, _ = drawn[0].axes
    assert set(values(left.lines[0])) == {found.rank} == {2}  # the biases of the last layer
    assert left.get_title(loc="left") == f"functional dimension 2 of {found.parameters}"


def test_tangent_kernel(tmp_path: Path, drawn: list[Any]) -> None:
    net, recorder = network(), TangentRecorder(SAMPLES[:6])
    with pytest.raises(linearize.UsageError, match="record"):
        recorder.draw(tmp_path / "a.png")
    recorder.record(net)
    with torch.no_grad():
        next(net.parameters()).mul_(2)
    row = recorder.record(net)
    recorder.draw(tmp_path / "a.png")
    assert written(tmp_path / "a.png")
    left, right = drawn[0].axes
    assert values(left.lines[0]) == [entry["distance"] for entry in recorder.curve]
    assert values(right.lines[0]) == [entry["rank"] for entry in recorder.curve]
    assert values(right.lines[1]) == [entry["effective_rank"] for entry in recorder.curve]
    assert [text.get_text() for text in right.get_legend().get_texts()] == ["rank", "effective rank"]
    assert (labels(left), labels(right)) == (("step", "distance from the start"), ("step", ""))
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


def test_symmetries(tmp_path: Path, drawn: list[Any]) -> None:
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
    (axes,), (empty,) = (figure.axes for figure in drawn)
    bars = [length for length in widths(axes) if length]  # the rest are there for the legend
    assert bars == [len(record.channels) - (record.kind == "parallel") for record in found]
    assert sum(bars) >= 3  # an inactive, a linear and a parallel channel were planted
    assert axes.get_title(loc="left") == f"planted: {sum(bars):.0f} redundant channels"
    kinds = dict.fromkeys(record.kind for record in found)
    assert [text.get_text() for text in drawn[0].legends[0].get_texts()][: len(kinds)] == list(kinds)
    assert (widths(empty), labels(empty)) == ([], ("redundant channels", ""))
    assert json.dumps([record.to_dict() for record in found])
    assert "inactive" in symmetry_table(found)


def test_separability(tmp_path: Path, drawn: list[Any]) -> None:
    pytest.importorskip("sklearn")
    found = class_separability(network(), SAMPLES, LABELS)
    found.draw(tmp_path / "a.png")
    assert written(tmp_path / "a.png")
    (axes,) = drawn[0].axes
    assert values(axes.lines[0]) == [100 * layer.accuracy for layer in found.layers]
    assert values(axes.lines[1]) == [100 * layer.separable / layer.classes for layer in found.layers]
    assert [text.get_text() for text in axes.get_xticklabels()] == [layer.name for layer in found.layers]
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
