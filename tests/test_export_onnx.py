"""ONNX: collapsed models in ONNX Runtime itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import linearize
from linearize.errors import ExportError
from tests.exported import IDS, MODELS, bert, mlp, off, small

onnx = pytest.importorskip("onnx")
runtime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


def session(path: Path) -> Any:
    return runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("onnx")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in ("bert", "convnext") else []) for name in MODELS]
)
def test_in_the_runtime(name: str, folder: Path) -> None:
    original, model = small(name)
    example = torch.randn(2, 3, 64, 64) if name == "convnext" else None
    made = linearize.export(model, folder / f"{name}.onnx", format="onnx", example_inputs=example)
    assert made.proof is not None
    assert made.proof.shapes == 3
    assert made.proof.error <= 1e-5
    # Our own look at it, at a shape of its own, with a negative control.
    if name in ("llama", "bert"):
        inputs: dict[str, Tensor] = {"input_ids": torch.cat((IDS, IDS.flip(1)))[:3, :7]}
        expected, before = (m(**inputs)[0].detach() for m in (model, original))
    else:
        inputs = {"x": torch.randn(5, 3, 32, 32) if name == "vit" else torch.randn(5, 3, 64, 64)}
        expected, before = (m(inputs["x"]).detach() for m in (model, original))
    found = torch.from_numpy(session(made.path).run(None, {k: v.numpy() for k, v in inputs.items()})[0])
    assert off(expected, found) <= 1e-5
    assert off(before, found) > 1e-2
    assert off(expected[:1], expected[1:2]) > 1e-3, "outputs depend on inputs"


def kinds(path: Path) -> set[str]:
    return {node.op_type for node in onnx.load(path, load_external_data=False).graph.node}


def test_merged_layers_add_slices_and_joins_and_nothing_else(folder: Path) -> None:
    """Beside the file that the test above has left."""
    linearize.export(small("vit")[0], folder / "before.onnx", format="onnx", check=False)
    if not (folder / "vit.onnx").exists():
        linearize.export(small("vit")[1], folder / "vit.onnx", format="onnx", check=False)
    added = kinds(folder / "vit.onnx") - kinds(folder / "before.onnx")
    assert added <= {"Slice", "Split", "Concat", "Pad", "Expand"}, added


def test_opset_and_weights_beside(tmp_path: Path) -> None:
    model = mlp()
    options: dict[str, Any] = {"opset": 19, "external_data": True, "example_inputs": torch.randn(2, 64)}
    made = linearize.export(model, tmp_path / "mlp.onnx", format="onnx", **options)
    assert made.files == ("mlp.onnx", "mlp.onnx.data")
    assert (tmp_path / "mlp.onnx").stat().st_size < (tmp_path / "mlp.onnx.data").stat().st_size
    read = onnx.load(tmp_path / "mlp.onnx")
    assert made.facts["opset"] == read.opset_import[0].version == 19
    batch = read.graph.input[0].type.tensor_type.shape.dim[0].dim_param
    assert batch == "batch"
    onnx.checker.check_model(tmp_path / "mlp.onnx")


def test_bfloat16_is_refused_with_the_parameter(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"embeddings.*weight: is of torch.bfloat16.*model.float\(\)"):
        linearize.export(bert().to(torch.bfloat16), tmp_path / "a.onnx", format="onnx")


class Drawing(nn.Module):
    """Another function in each run: no file can be the same."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.layer = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        out: Tensor = self.layer(x) * self.calls
        return out


def test_a_file_that_computes_something_else_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"ONNX Runtime .* it is"):
        linearize.export(Drawing(), tmp_path / "a.onnx", format="onnx", example_inputs=torch.randn(2, 4))
    assert list(tmp_path.iterdir()) == []
