"""PTE: collapsed models in ExecuTorch itself."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import linearize
from linearize.errors import ExportError
from tests.exported import collapsed, mlp, off

runtime = pytest.importorskip("executorch.runtime")


def test_in_the_runtime(tmp_path: Path) -> None:
    """Our own look at it, with a negative control."""
    original = mlp()
    x = torch.randn(1, 64)
    model = collapsed(original, x)
    assert any(type(module).__name__ == "CarryLinear" for module in model.modules())
    made = linearize.export(model, tmp_path / "a.pte", format="pte", example_inputs=x)
    assert made.proof is not None
    assert made.proof.error <= 1e-5
    assert made.facts["inputs"] == "input [1, 64]", "the size of the example"
    assert int(made.facts["parts in XNNPACK"]) > 0
    other = torch.randn(1, 64)
    (found,) = runtime.Runtime.get().load_program(str(made.path)).load_method("forward").execute([other])
    assert off(model(other), found) <= 1e-5
    assert off(original(other), found) > 1e-2


def test_other_types_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"0.weight: is of torch.float16.*nearest format that can: \"onnx\""):
        linearize.export(mlp().half(), tmp_path / "a.pte", format="pte", example_inputs=torch.randn(1, 64).half())
