"""Activation calls redirected in the source: forwards that symbolic tracing cannot follow."""

from __future__ import annotations

import copy
import functools
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - the usual name in user code
from torch import Tensor, nn

import linearize
from tests.chain import check_chain


class Base(nn.Module):
    """An activation in a method that a subclass inherits."""

    def head(self, x: Tensor) -> Tensor:
        return torch.tanh(x)


def doubled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(function)
    def inner(*args: Any, **kwargs: Any) -> Tensor:
        return 2 * function(*args, **kwargs)

    return inner


class Branching(Base):
    """Control flow on shapes, nested calls, a branch not taken, another method, a decorator and `super`."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = nn.Linear(6, 12), nn.Linear(12, 10), nn.Linear(10, 8), nn.Linear(8, 5)

    @doubled
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        if x.shape[-1] != self.a.in_features:
            raise ValueError(f"found {x.shape[-1]} features")
        if x.dim() > 5:
            x = F.gelu(x)
        y = F.gelu(self.b(F.gelu(self.a(x), approximate="tanh")))
        return self.d(self.tail(y))

    def tail(self, y: Tensor) -> Tensor:
        return super().head(self.c(y)).relu() if len(y.shape) > 1 else y


class Looping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.last = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))

    def forward(self, x: Tensor) -> Tensor:
        if int(x.shape[0]) > 0:
            for layer in self.layers:
                x = F.silu(layer(x)) if bool(x.shape[0] > 0) else x
        return self.last(x)


@pytest.mark.parametrize("when", ["always", "cheaper"])
def test_chain(when: str) -> None:
    torch.manual_seed(0)
    check_chain(Branching().double(), torch.randn(3, 6, dtype=torch.float64), when=when)


def test_every_call_has_its_gate() -> None:
    torch.manual_seed(0)
    model, x = Branching(), torch.randn(3, 6)
    gated = linearize.convert(model, x)
    # The method of the base class is called by `super`, which no subclass changes.
    assert {name: gate.channels for name, gate in linearize.gates(gated).items()} == {
        "gelu_0": 12,
        "gelu_1": 10,
        "relu_0": 8,
    }
    reasons = {row.name: row.reason for row in linearize.summary(gated).sites if not row.gated}
    assert list(reasons) == ["tanh_0"]
    assert "tanh is called by a function around it" in (reasons["tanh_0"] or "")
    assert torch.equal(gated(x), model(x))
    with pytest.raises(ValueError, match="found 5 features"):
        gated(torch.randn(3, 5))


def test_copies_and_pickles() -> None:
    torch.manual_seed(0)
    model, x = Branching(), torch.randn(3, 6)
    gated = linearize.convert(model, x)
    linearize.gates(gated)["gelu_0"].linearize_(torch.ones(12, dtype=torch.bool))
    expected = gated(x)
    assert torch.equal(copy.deepcopy(gated)(x), expected)
    assert torch.equal(pickle.loads(pickle.dumps(gated))(x), expected)  # noqa: S301 - our own bytes
    assert isinstance(gated, Branching)


def test_a_call_in_a_loop_says_so() -> None:
    torch.manual_seed(0)
    gated = linearize.convert(Looping(), torch.randn(3, 4))
    assert set(linearize.gates(gated)) >= {"last.1"}
    rows = linearize.summary(gated).sites
    reasons = [row.reason or "" for row in rows if not row.gated]
    assert reasons
    assert all("one call of silu in the source of its methods runs 3 times" in reason for reason in reasons)


class Documented(nn.Module):
    """A forward with texts of several lines, whose indentation is a part of them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 12), nn.Linear(12, 5)
        self.said = ""

    def forward(self, x: Tensor) -> Tensor:
        """What it does.

        Args:
            x: of shape (B, 6).
        """
        self.said = """first
            second
        third"""
        y: Tensor = self.b(F.gelu(self.a(x)))
        return y


def test_texts_of_several_lines_stay_as_they_are() -> None:
    """The forwards of transformers' encoders for speech have such docstrings, and got no gate for it."""
    x = torch.randn(3, 6, dtype=torch.float64)
    gated, _ = check_chain(Documented().double(), x)
    plain: Any = Documented().double()
    plain(x)
    assert gated.said == plain.said == "first\n            second\n        third"
    assert type(gated).forward.__code__.co_consts[0] == Documented.forward.__code__.co_consts[0]


def test_both_convolutions_of_whisper_get_gates() -> None:
    from transformers import WhisperConfig, WhisperModel

    sizes = {"d_model": 16, "vocab_size": 64, "num_mel_bins": 8, "max_source_positions": 10, "max_target_positions": 8}
    counts = {f"{side}_{what}": 2 for side in ("encoder", "decoder") for what in ("layers", "attention_heads")}
    config = WhisperConfig(**sizes, **counts, encoder_ffn_dim=24, decoder_ffn_dim=24, pad_token_id=0)
    inputs = {"input_features": torch.randn(1, 8, 20), "decoder_input_ids": torch.ones(1, 3, dtype=torch.long)}
    gated = linearize.convert(WhisperModel(config).eval(), inputs)
    assert {"encoder.gelu_0", "encoder.gelu_1"} <= set(linearize.gates(gated))
