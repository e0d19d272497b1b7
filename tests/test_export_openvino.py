"""OpenVINO: collapsed models in the runtime itself, on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import linearize
from linearize.errors import ExportError
from tests.exported import IDS, mlp, off, small

openvino = pytest.importorskip("openvino")


@pytest.mark.parametrize("name", ["llama", pytest.param("vit", marks=pytest.mark.slow)])
def test_in_the_runtime(name: str, tmp_path: Path) -> None:
    original, model = small(name)
    made = linearize.export(model, tmp_path / "small.xml", format="openvino")
    assert made.files == ("small.xml", "small.bin")
    assert made.proof is not None
    assert made.proof.shapes == 3
    assert made.proof.error <= 1e-5
    x = torch.cat((IDS, IDS.flip(1)))[:3, :7] if name == "llama" else torch.randn(5, 3, 32, 32)
    outputs = [m(x) if name == "vit" else m(input_ids=x).logits for m in (model, original)]
    core = openvino.Core()
    compiled = core.compile_model(tmp_path / "small.xml", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    assert next(iter(compiled.input(0).names)) == made.facts["inputs"]
    found = torch.from_numpy(compiled(x.numpy())[0])
    assert off(outputs[0], found) <= 1e-5
    assert off(outputs[1], found) > 1e-2, "negative control"


def test_mixed_types_are_refused(tmp_path: Path) -> None:
    model: Any = mlp()
    model[2].double()
    with pytest.raises(ExportError, match=r"2.weight: is of torch.float64, and others are of torch.float32"):
        linearize.export(model, tmp_path / "a.xml", format="openvino", example_inputs=torch.randn(2, 64))
