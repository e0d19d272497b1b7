"""Models whose control flow depends on their data: captured part by part."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - the usual name in user code
from torch import Tensor, nn

import linearize
from linearize.graph.parts import discover_parts
from tests.chain import check_chain, error, outputs
from tests.processors import assert_same_outputs, assert_same_tensors

SEEDS = {False: 0, True: 48}
"""Of inputs that take the branch with a keyword, and the one without."""


def inputs(positive: bool = False) -> Tensor:
    return torch.randn(3, 6, generator=torch.Generator().manual_seed(SEEDS[positive]))


X = inputs()


def mlp(width: int = 16) -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Linear(width, 6))


class Functional(nn.Module):
    """An activation function between layers of its own; `scale` decides which branch a symbolic trace would take."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 16), nn.Linear(16, 6)

    def forward(self, x: Tensor, scale: float | None = None) -> Tensor:
        h = F.gelu(self.a(x))
        return self.b(h * scale if scale is not None else h)


class Routed(nn.Module):
    """Three parts in an order that the data decides."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = mlp(), Functional(), mlp(24)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if x.sum() > 0:
            return self.third(self.second(x))
        return self.second(self.third(x), scale=None)


def routed() -> Routed:
    torch.manual_seed(0)
    return Routed().eval()


def test_chain() -> None:
    model = routed().double()
    gated, _ = check_chain(model, X.double())
    assert set(linearize.gates(gated)) == {"first.1", "second.gelu_0", "third.1"}


@pytest.mark.parametrize("positive", [False, True])
def test_both_ways_through(positive: bool) -> None:
    """What one branch has shown holds in the other."""
    model, x = routed().double(), inputs(positive).double()
    assert bool(model.first(x).sum() > 0) == positive
    gated = linearize.convert(model, x)
    for gate in linearize.gates(gated).values():
        gate.linearize_(torch.arange(gate.channels) % 2 == 0)
    collapsed = linearize.collapse(gated, when="always")
    assert {row.form for row in linearize.summary(gated).sites} == {"merged"}
    signs = set()
    for seed in range(20):
        torch.manual_seed(seed)
        x = 3 * torch.randn(2, 6, dtype=torch.float64)
        signs.add(bool(gated.first(x).sum() > 0))  # type: ignore[operator]
        assert error(outputs(gated, x), outputs(collapsed, x)) <= 1e-12
    assert signs == {True, False}


def test_another_value_than_at_the_conversion() -> None:
    """A forward that is rewritten in its source asks for its arguments at each call."""
    model, x = routed(), inputs(positive=True)
    gated = linearize.convert(model, x)
    assert torch.equal(gated.second(x, None), model.second(x))  # type: ignore[operator]
    for value in (None, 2.0, torch.tensor(0.5)):
        assert torch.equal(gated.second(x, scale=value), model.second(x, scale=value))  # type: ignore[operator]
    assert not torch.equal(model.second(x), model.second(x, scale=2.0))


def test_saved_and_loaded(tmp_path: Path) -> None:
    gated = linearize.convert(routed(), X)
    for gate in linearize.gates(gated).values():
        gate.linearize_(torch.ones(gate.channels, dtype=torch.bool))
    collapsed = linearize.collapse(gated)
    linearize.save(collapsed, tmp_path / "m.safetensors")
    loaded = linearize.load(tmp_path / "m.safetensors", model=routed())
    assert_same_tensors(collapsed, loaded)
    assert_same_outputs(collapsed.eval(), loaded.eval(), lambda each: [each(X)])


def test_a_part_that_shares_a_tensor_is_no_part() -> None:
    model = routed()
    model.third = mlp()
    model.third[2].weight = model.second.b.weight
    assert {site.name for site in discover_parts(model, ((X,), {}))} == {"first.1"}


def test_a_part_whose_inside_is_called_from_outside_is_no_part() -> None:
    class Peeking(Routed):
        def forward(self, x: Tensor) -> Tensor:
            hidden: Tensor = super().forward(x)
            return hidden + self.first[2](F.pad(hidden, (0, 10)))

    torch.manual_seed(0)
    names = {site.name for site in discover_parts(Peeking().eval(), ((X,), {}))}
    assert names == {"second.gelu_0", "third.1"}


def test_nothing_left_says_why() -> None:
    class Only(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 6)

        def forward(self, x: Tensor) -> Tensor:
            h = F.relu(self.a(x))
            return self.b(h) if h.sum() > 0 else h

    with pytest.raises(linearize.CaptureError, match="cannot capture"):
        linearize.convert(Only(), X)
