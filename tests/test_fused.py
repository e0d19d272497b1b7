"""Fused paths: torch's transformer layers, and forwards of users that go another way without gradients."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - the usual name in user code
from torch import Tensor, nn

import linearize
from linearize.surgery.fused import SWITCH
from tests.chain import error, randomize

WIDTH = 16


def encoder(activation: Any, *, nested: bool = True, layers: int = 2) -> nn.Module:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(WIDTH, 2, 32, 0.0, activation=activation, batch_first=True)
    return nn.TransformerEncoder(layer, layers, enable_nested_tensor=nested).double().eval()


def both(model: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """What is served, and what training sees."""
    with torch.no_grad():
        served = model(*args, **kwargs)
    return served, model(*args, **kwargs).detach()


ACTIVATIONS: dict[str, Callable[[], Any]] = {"module": nn.GELU, "name": lambda: "gelu", "function": lambda: F.relu}


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_gates_count_in_both_modes(kind: str, tmp_path: Path) -> None:
    model = encoder(ACTIVATIONS[kind]())
    x = torch.randn(3, 5, WIDTH, dtype=torch.float64)
    gated = linearize.convert(model, x)
    assert set(linearize.gates(gated)) == {"layers.0.activation", "layers.1.activation"}
    assert torch.equal(both(model, x)[1], both(gated, x)[1])
    assert linearize.verify(model, gated, x).passed
    randomize(gated, 0.5)
    assert not linearize.verify(model, gated, x).passed
    served, trained = both(gated, x)
    assert error([trained], [served]) <= 1e-12
    for again in (copy.deepcopy(gated), pickle.loads(pickle.dumps(gated))):  # noqa: S301 - our own bytes
        assert torch.equal(both(again, x)[0], served)
    collapsed = linearize.collapse(gated, when="always")
    assert error([served, trained], list(both(collapsed, x))) <= 1e-12
    linearize.save(collapsed, tmp_path / "m.safetensors")
    loaded = linearize.load(tmp_path / "m.safetensors", model=encoder(ACTIVATIONS[kind]()))
    assert error(list(both(collapsed, x)), list(both(loaded, x))) <= 1e-12
    assert len(pickle.dumps(collapsed)) > 0


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_a_batch_with_padding() -> None:
    """The fused path leaves zeros at padded positions; so does the path that is taken in its place."""
    model = encoder("gelu")
    x = torch.randn(3, 5, WIDTH, dtype=torch.float64)
    padding = torch.arange(5)[None] >= torch.tensor([5, 3, 2])[:, None]
    gated = linearize.convert(model, (x,))
    arguments = {"src_key_padding_mask": padding}
    for a, b in zip(both(model, x, **arguments), both(gated, x, **arguments), strict=True):
        assert error([a], [b]) <= 1e-12
    randomize(gated, 0.5)
    served, trained = both(gated, x, **arguments)
    assert error([trained[~padding]], [served[~padding]]) <= 1e-12
    assert bool((served[padding] == 0).all())
    collapsed = linearize.collapse(gated, when="always")
    assert error([served], [both(collapsed, x, **arguments)[0]]) <= 1e-12


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_converted_with_padding() -> None:
    model = encoder(nn.ReLU())
    x = torch.randn(3, 5, WIDTH, dtype=torch.float64)
    inputs = {"src": x, "src_key_padding_mask": torch.arange(5)[None] >= torch.tensor([5, 4, 1])[:, None]}
    gated = linearize.convert(model, inputs)
    assert len(linearize.gates(gated)) == 2
    assert linearize.verify(model, gated, inputs).passed
    randomize(gated, 0.5)
    assert linearize.verify(gated, linearize.collapse(gated, when="always"), inputs).passed


def test_a_layer_by_itself_without_a_batch_then_with_one() -> None:
    """The example does not show the fused path, since it takes batches only."""
    layer = nn.TransformerEncoderLayer(WIDTH, 2, 32, 0.0, batch_first=True).double().eval()
    gated = linearize.convert(layer, torch.randn(5, WIDTH, dtype=torch.float64))
    randomize(gated, 1.0)
    served, trained = both(gated, torch.randn(2, 5, WIDTH, dtype=torch.float64))
    assert error([trained], [served]) <= 1e-12


def test_the_fused_path_comes_back_where_no_gate_is_left() -> None:
    model = encoder("relu")
    x = torch.randn(3, 5, WIDTH, dtype=torch.float64)
    gated = linearize.convert(model, x)
    assert not any(vars(m).get(SWITCH) for m in gated.modules())
    gate = linearize.gates(gated)["layers.1.activation"]
    gate.linearize_(torch.ones(32, dtype=torch.bool))
    collapsed = linearize.collapse(gated, when="always")
    assert vars(collapsed.get_submodule("layers.0"))[SWITCH] == 1
    assert vars(collapsed.get_submodule("layers.1"))[SWITCH] == 0
    assert [step["path"] for step in collapsed._linearize.steps if step["module"]["type"] == "Unfused"] == ["layers.1"]  # type: ignore[union-attr]
    assert error(list(both(gated, x)), list(both(collapsed, x))) <= 1e-12


def test_only_some_layers() -> None:
    model = encoder("gelu", layers=3)
    x = torch.randn(2, 4, WIDTH, dtype=torch.float64)
    gated = linearize.convert(model, x, include="layers.1.*")
    assert [bool(vars(layer)[SWITCH]) for layer in gated.layers] == [True, False, True]  # type: ignore[union-attr]
    randomize(gated, 1.0)
    served, trained = both(gated, x)
    assert error([trained], [served]) <= 1e-12


def test_frozen_weights_take_the_fused_path_too() -> None:
    model = encoder("gelu").requires_grad_(False)
    x = torch.randn(2, 4, WIDTH, dtype=torch.float64)
    gated = linearize.convert(model, x)
    randomize(gated, 1.0)
    assert not linearize.verify(model, gated, x).passed


class OwnFused(nn.Module):
    """A kernel of the user's own in eval mode without gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.act, self.b = nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        if not torch.is_grad_enabled() and not self.training:
            return F.linear(F.linear(x, self.a.weight, self.a.bias).clamp(min=0), self.b.weight, self.b.bias)
        return self.b(self.act(self.a(x)))


def test_a_fused_path_without_a_switch_is_named() -> None:
    model = nn.Sequential(OwnFused(), nn.GELU(), nn.Linear(5, 2))
    gated = linearize.convert(model, torch.randn(2, 6))
    rows = {row.name: row for row in linearize.summary(gated).sites}
    assert set(linearize.gates(gated)) == {"1"}
    reasons = [row.reason or "" for row in rows.values() if not row.gated]
    assert all("goes another way" in reason or "no linear map" in reason for reason in reasons)
    randomize(gated, 1.0)
    x = torch.randn(3, 6)
    served, trained = both(gated, x)
    assert error([trained], [served]) <= 1e-5


class Bypassed(nn.Module):
    """The activation is called in both modes, the map before it in one."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.act, self.b = nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        quick = not torch.is_grad_enabled()
        h = x @ self.a.weight.T + self.a.bias if quick else self.a(x)
        return self.b(self.act(h))


def test_a_map_that_is_passed_by_is_not_merged() -> None:
    x = torch.randn(3, 6, dtype=torch.float64)
    gated = linearize.convert(Bypassed().double().eval(), x)
    randomize(gated, 1.0)
    collapsed = linearize.collapse(gated, when="always")
    assert error(list(both(gated, x)), list(both(collapsed, x))) <= 1e-12


def test_a_decoder_layer_keeps_its_gate_when_it_is_copied() -> None:
    """torch's class hides a child `activation` of every copy."""
    torch.manual_seed(0)
    for activation in ("gelu", nn.GELU()):
        layer = nn.TransformerDecoderLayer(WIDTH, 2, 32, 0.0, activation=activation, batch_first=True).double().eval()
        inputs = tuple(torch.randn(2, 4, WIDTH, dtype=torch.float64) for _ in range(2))
        gated = linearize.convert(layer, inputs)
        assert error(list(both(layer, *inputs)), list(both(gated, *inputs))) <= 1e-12
        randomize(gated, 0.5)
        expected = list(both(gated, *inputs))
        assert error(expected, list(both(linearize.collapse(gated, when="always"), *inputs))) <= 1e-12
        assert error(expected, list(both(copy.deepcopy(gated), *inputs))) == 0
        assert error(expected, list(both(pickle.loads(pickle.dumps(gated)), *inputs))) == 0  # noqa: S301 - our own bytes
