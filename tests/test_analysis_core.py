"""The core network: widths, depth, the record of both, and their pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import linearize
from linearize.analysis import CoreRecorder, core_network
from linearize.analysis.core import draw_curve
from linearize.cli import app
from tests import toys
from tests.chain import randomize


def test_widths_are_those_of_the_gates() -> None:
    model, inputs = toys.make("inverted_residual")
    plain = core_network(model, inputs)
    assert [layer.name for layer in plain.layers] == ["act1", "act2"]
    assert (plain.depth, plain.width, plain.share) == (2.0, 12.0, 1.0)
    gated = linearize.convert(model, inputs)
    randomize(gated, 0.5)
    core = core_network(gated)  # the converted model remembers its inputs
    assert [layer.width for layer in core.layers] == [6, 6]
    for layer, gate in zip(core.layers, linearize.gates(gated).values(), strict=True):
        assert torch.equal(layer.nonlinear, ~gate.linear)
    collapsed = core_network(linearize.collapse(gated, when="always"), inputs)
    assert [layer.width for layer in collapsed.layers] == [6, 6]
    assert json.loads(json.dumps(core.to_dict()))["layers"][0]["width"] == 6
    assert "effective depth 1.00 units (normalized)" in str(core)


def test_a_block_that_runs_twice_is_one_layer_and_two_units_deep() -> None:
    model, inputs = toys.make("repeated_block")
    core = core_network(model, inputs, weighting="unnormalized")
    assert len(core.layers) == 1
    assert core.depth > 1.5


def test_the_recorder_follows_a_prior(tmp_path: Path, drawn: list[Any]) -> None:
    model, inputs = toys.make("deep_mlp")
    gated = linearize.convert(model, inputs)
    prior = linearize.SparsityPrior(gated, kind="target", target=0.5, steps=4)
    recorder = CoreRecorder.of(gated)
    recorder.record(accuracy=0.5)
    for _ in range(4):
        prior.step()
        recorder.record()
    depths = [row["depth"] for row in recorder.curve]
    assert depths[0] == 3
    assert depths == sorted(depths, reverse=True)
    assert recorder.curve[-1]["share"] == pytest.approx(0.5)
    assert recorder.curve[0]["accuracy"] == 0.5
    assert float(linearize.average_path_length(gated)) == depths[-1]
    pytest.importorskip("matplotlib")
    recorder.draw(tmp_path / "curve.png", "a prior")
    core_network(gated).draw(tmp_path / "core.svg")
    curve, core = drawn
    assert curve.get_suptitle() == "a prior"
    assert [float(y) for y in curve.axes[0].lines[0].get_ydata()] == depths
    assert [float(y) for y in curve.axes[1].lines[0].get_ydata()] == [row["width"] for row in recorder.curve]
    assert [float(y) for y in curve.axes[2].lines[0].get_ydata()] == [100 * row["share"] for row in recorder.curve]
    layers = core_network(gated).layers
    assert [text.get_text() for text in core.axes[0].texts] == [f" {a.width} of {a.channels}" for a in layers]
    cells = [mesh.get_array().flatten().tolist() for mesh in core.axes[0].collections]
    assert cells == [layer.nonlinear.double().tolist() for layer in layers]
    assert "<svg" in (tmp_path / "core.svg").read_text()


def test_pictures_say_what_is_wrong(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    with pytest.raises(linearize.UsageError, match="record"):
        draw_curve([], tmp_path / "x.png")
    with pytest.raises(linearize.UsageError, match="cannot be written"):
        core_network(*toys.make("mlp")).draw(tmp_path / "missing" / "x.png")


def test_inspect_writes_the_picture(tmp_path: Path, drawn: list[Any]) -> None:
    pytest.importorskip("timm")
    pytest.importorskip("matplotlib")
    picture = tmp_path / "core.png"
    done = CliRunner().invoke(app, ["inspect", "timm:test_vit", "--picture", str(picture)])
    assert done.exit_code == 0, done.output
    assert "effective depth" in done.output
    assert picture.read_bytes().startswith(b"\x89PNG")
    (figure,) = drawn
    names = [text.get_text() for text in figure.axes[0].get_yticklabels()]
    assert names == [f"blocks.{i}.mlp.act" for i in range(len(names))]
    assert len(names) > 1
