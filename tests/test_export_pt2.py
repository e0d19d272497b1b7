"""PT2: compiled packages, loaded in a process that has neither the model's code nor linearize."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

import linearize
from linearize.errors import UsageError
from tests.exported import collapsed, elsewhere, off


class Own(nn.Module):
    """A class that the other process does not have."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.act, self.down = nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 8)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"y": self.down(self.act(self.up(x)))}


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor compiles C++, and there is no compiler")
def test_without_the_code_of_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))  # not code for another processor
    torch.manual_seed(0)
    original = Own()
    model = collapsed(original, torch.randn(4, 32))
    made = linearize.export(model, tmp_path / "own.pt2", format="pt2", example_inputs=torch.randn(4, 32))
    assert made.facts["open sizes"] == "x [batch]"
    assert made.proof is not None
    assert made.proof.error <= 1e-5
    x = torch.randn(7, 32)
    code = "found['y'], = torch._inductor.aoti_load_package(path)(x)"
    found = elsewhere(code, path=tmp_path / "own.pt2", x=x)["y"]
    assert off(model(x)["y"], found) <= 1e-5
    assert off(original(x)["y"], found) > 1e-2, "negative control"


def test_a_compiler_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UsageError, match=r"format pt2: needs a C.. compiler, and no-such-compiler is not there"):
        linearize.export(Own(), tmp_path / "a.pt2", format="pt2", example_inputs=torch.randn(2, 32))
