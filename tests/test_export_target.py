"""Plans for a format: `compress(..., target=...)` takes only what the format can hold."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import linearize
from linearize.compress import compress
from linearize.errors import ExportError, UsageError
from linearize.export.registry import FORMATS
from linearize.planning.request import Request
from tests.exported import llama, mlp, transformer
from tests.toys import QUIET

IDS = torch.randint(3, 60, (60, 10), generator=torch.Generator().manual_seed(1))
DATA = [{"input_ids": IDS, "use_cache": False}] * 3
# What each format can be planned for: layers of ours, equal widths, whole modules as maps, multiples.
TABLE: dict[str, tuple[bool, bool, bool, int | None]] = {
    "onnx": (True, False, True, None),
    "openvino": (True, False, True, None),
    "pt2": (True, False, True, None),
    "pte": (True, False, True, None),
    "remote": (True, False, True, None),
    "stock": (False, True, False, None),
    "gguf": (False, False, False, 32),
    "decilm": (False, False, False, 256),
}


@pytest.mark.parametrize("name", FORMATS)
def test_the_table(name: str) -> None:
    means = Request(flops=0.5, target=name).means
    assert (means.own_layers, means.uniform, means.modules, means.round_to) == TABLE[name]
    assert Request(flops=0.5, target=name, round_to=16).means.round_to == 16
    assert Request(flops=0.5, target=name, modules=False, stock=True).means.uniform


def widths(model: Any) -> list[int]:
    return [layer.mlp.up_proj.out_features for layer in model.model.layers]


@pytest.mark.slow
def test_gguf_gets_ordinary_layers_of_their_own_widths() -> None:
    model = llama(num_hidden_layers=3)
    nn.init.normal_(model.model.layers[1].mlp.down_proj.weight, std=1e-3)  # what matters little may go first
    small = compress(model, DATA, flops=0.7, target="gguf", **QUIET).model
    assert not [m for m in small.modules() if type(m).__module__.startswith("linearize.")]
    assert all(width % 32 == 0 for width in widths(small))
    assert len(set(widths(small))) > 1
    assert FORMATS["gguf"].can(small) is None
    assert FORMATS["stock"].can(small) is not None


@pytest.mark.slow
def test_without_a_target_the_same_budget_takes_what_gguf_has_not() -> None:
    """The negative control."""
    small = compress(llama(num_hidden_layers=3), DATA, flops=0.7, **QUIET).model
    assert [m for m in small.modules() if type(m).__module__.startswith("linearize.")]


def test_bad_targets() -> None:
    with pytest.raises(UsageError, match="target: found 'tflite'"):
        compress(llama(), DATA, flops=0.7, target="tflite", **QUIET)
    with pytest.raises(UsageError, match="target: found beside linear="):
        compress(llama(), DATA, linear=0.5, target="gguf", **QUIET)
    with pytest.raises(ExportError, match="Sequential: is no causal language model"):
        compress(mlp(), [torch.randn(8, 64)], flops=0.7, target="gguf", **QUIET)
    model = transformer("GPTNeoXForCausalLM", "GPTNeoXConfig")
    seen: list[str] = []
    with pytest.raises(ExportError, match=r"is no causal language model of the kinds.*nearest.*\"remote\""):
        compress(model, DATA, flops=0.7, target="gguf", **{**QUIET, "progress": seen.append})
    assert seen == [], "before any work"
    assert linearize.ExportError is ExportError
