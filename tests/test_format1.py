"""Files of format version 1, written by the code of that time, load as the functions that they were."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import nn

import linearize
from tests.format1 import NETS

FILES = Path(__file__).parent / "files"


@pytest.mark.parametrize("name", NETS)
def test_an_old_file_is_the_same_function(name: str, tmp_path: Path) -> None:
    make, x = NETS[name]
    path = FILES / f"format1_{name}.safetensors"
    with safe_open(path, framework="pt") as file:
        assert file.metadata()["version"] == "1"
        expected = file.get_tensor("expected")
    base = make()
    base.register_buffer("expected", torch.zeros_like(expected))
    loaded = linearize.load(path, model=base)
    found = loaded(x)
    assert not torch.equal(found, base.eval()(x)), "negative control"
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    linearize.save(loaded, tmp_path / "new.safetensors")
    with safe_open(tmp_path / "new.safetensors", framework="pt") as file:
        assert file.metadata()["version"] == "2"
    again = linearize.load(tmp_path / "new.safetensors", model=base)
    assert list(again.state_dict()) == list(loaded.state_dict())
    assert all(
        torch.equal(a, b) for a, b in zip(again.state_dict().values(), loaded.state_dict().values(), strict=True)
    )


def test_what_the_old_files_hold() -> None:
    """Every kind of layer whose tensors were named otherwise."""
    kinds = set()
    for name, (make, _) in NETS.items():
        base = make()
        path = FILES / f"format1_{name}.safetensors"
        with safe_open(path, framework="pt") as file:
            base.register_buffer("expected", torch.zeros_like(file.get_tensor("expected")))
        loaded: nn.Module = linearize.load(path, model=base)
        kinds |= {type(module).__name__ for module in loaded.modules()}
    assert kinds >= {"CarryLinear", "CarryConv", "InputCarryConv", "BorderConv", "OnesLinear", "Ones"}
