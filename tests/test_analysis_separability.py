"""Linear separability, layer by layer."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import linearize
from linearize.analysis import class_separability
from tests import toys

pytest.importorskip("sklearn")


def folding() -> nn.Sequential:
    """Exclusive or: the hidden layer holds |x - y| as two channels, which make the classes separable."""
    net = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1))
    first, last = net[0], net[2]
    assert isinstance(first, nn.Linear)
    assert isinstance(last, nn.Linear)
    with torch.no_grad():
        first.weight.copy_(torch.tensor([[1.0, -1.0], [-1.0, 1.0]]))
        first.bias.zero_()
        last.weight.fill_(1.0)
        last.bias.fill_(-0.5)
    return net


def exclusive_or(count: int = 200) -> tuple[torch.Tensor, torch.Tensor]:
    bits = torch.randint(0, 2, (count, 2))
    return bits + 0.2 * (torch.rand(count, 2) - 0.5), (bits[:, 0] ^ bits[:, 1])


def test_the_hidden_layer_makes_the_classes_separable() -> None:
    x, y = exclusive_or()
    found = class_separability(folding(), x, y)
    assert [layer.name for layer in found.layers] == ["input", "1", "output"]
    assert [layer.separable for layer in found.layers] == [0, 2, 2]
    assert found["input"].accuracy < 0.8
    assert found["1"].margin is not None
    assert found["1"].margin > 0
    assert not found["1"].trivial
    assert json.loads(json.dumps(found.to_dict()))["layers"][0]["margin"] is None
    assert "2 of 2" in str(found)


def test_several_classes_images_and_projections() -> None:
    model, _ = toys.make("inverted_residual")
    x, y = torch.randn(60, 4, 9, 9), torch.arange(60) % 3
    x[:, 0] += 3.0 * y[:, None, None]  # the classes lie on a line: the middle one is not apart from the rest
    x[:, 1:] *= 0.01
    found = class_separability(model, x, y, features="flatten", limit=30)
    assert found["input"].features == 30
    assert found["act1"].features == 30
    pooled = class_separability(model, x, y)
    assert pooled["act1"].features == 12
    assert pooled["input"].trivial
    assert all(layer.classes == 3 for layer in pooled.layers)


def test_bad_input() -> None:
    x, y = exclusive_or(20)
    with pytest.raises(linearize.UsageError, match="for 20 samples"):
        class_separability(folding(), x, y[:5])
    with pytest.raises(linearize.UsageError, match="single class"):
        class_separability(folding(), x, torch.zeros(20))
    with pytest.raises(linearize.UsageError, match="features"):
        class_separability(folding(), x, y, features="all")  # type: ignore[arg-type]
