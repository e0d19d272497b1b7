"""Random networks through the whole chain: original = gated = collapsed, also at other batch sizes and resolutions.

A longer run: ``LINEARIZE_FUZZ_FROM=1000 LINEARIZE_FUZZ_TO=9000 pytest tests/test_fuzz.py``.
"""

from __future__ import annotations

import os
import random
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import linearize
from linearize.errors import ConvertError
from tests.chain import outputs, randomize
from tests.random_networks import Network, network

SEEDS = range(int(os.environ.get("LINEARIZE_FUZZ_FROM", "0")), int(os.environ.get("LINEARIZE_FUZZ_TO", "50")))
# Sums in another order, through a few layers whose random surrogates may cancel each other.
CLOSE = 1e-10
# A gate does not overwrite its input: its result may have another stride along an axis of size 1, and the next
# convolution then adds up in another order.
ROUNDING = 1e-14


def difference(expected: list[Tensor], found: list[Tensor]) -> float:
    """Largest relative error over all outputs; infinite where shapes or types differ."""
    if [(t.shape, t.dtype) for t in expected] != [(t.shape, t.dtype) for t in found]:
        return float("inf")
    worst = 0.0
    for a, b in zip(expected, found, strict=True):
        if a.numel():
            error = float((a - b).abs().max() / a.abs().max().clamp_min(torch.finfo(a.dtype).tiny))
            worst = max(worst, error if error == error else float("inf"))  # noqa: PLR0124 - NaN is an error
    return worst


def finite(tensors: list[Tensor]) -> bool:
    return bool(tensors) and all(bool(torch.isfinite(t).all()) for t in tensors)


def run(model: nn.Module, shape: tuple[int, ...]) -> tuple[Tensor, list[Tensor]] | None:
    """An input of a shape and the outputs on it, if the model runs there and puts out finite numbers."""
    x = torch.randn(shape, dtype=torch.float64)
    try:
        found = outputs(model, x.clone())
    except RuntimeError:  # too small for its pools and kernels, or a width that its linear layers do not take
        return None
    return (x, found) if finite(found) else None


def other_shapes(shape: tuple[int, ...], rng: random.Random) -> list[tuple[int, ...]]:
    """Other batch sizes, lengths and resolutions; not every model takes all of them."""
    batch = rng.choice((1, 2, 4, 5))
    shapes = [(batch, *shape[1:])]
    if len(shape) == 3:
        shapes += [(batch, shape[1] + 2, shape[2]), (batch, shape[1], shape[2] + 3)]
    if len(shape) == 4:
        shapes += [(batch, shape[1], shape[2] + rng.choice((1, 2, 3)), shape[3] + rng.choice((0, 1, 4)))]
    return shapes


def state(model: nn.Module) -> list[Any]:
    """What must not change in a model that is passed in."""
    modules = [(path, type(module), module.training) for path, module in model.named_modules()]
    return [*modules, *((key, value.clone()) for key, value in model.state_dict().items())]


def same_state(before: list[Any], after: list[Any]) -> bool:
    return len(before) == len(after) and all(
        torch.equal(a[1], b[1]) and a[0] == b[0] if isinstance(a[1], Tensor) else a == b
        for a, b in zip(before, after, strict=True)
    )


def stir(model: nn.Module, rng: random.Random) -> None:
    """Make a share of the channels linear; some constant, some gates not at all, some channels on their way."""
    randomize(model, rng.choice((0.3, 0.5, 0.8, 1.0, 1.0)), seed=rng.randrange(99))
    for gate in linearize.gates(model).values():
        if rng.random() < 0.1:
            gate.slope.zero_()
            gate.intercept.mul_(rng.choice((0, 1)))
        if rng.random() < 0.15:
            gate.frozen.zero_()
            gate.alpha.data.zero_()
        if rng.random() < 0.15:
            gate.alpha.data[torch.rand(gate.channels) < 0.4] = 0.3


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")
@pytest.mark.filterwarnings("ignore:.* channels have an alpha between 0 and 1:UserWarning")
@pytest.mark.parametrize("seed", SEEDS)
def test_random_network(seed: int) -> None:
    made, rng = network(seed), random.Random(seed)  # noqa: S311 - not for secrets
    model = build(made)
    first = run(model, made.shape)
    if first is None:
        return  # the generator does not keep count of sizes: one in twenty networks does not run
    model.train(rng.random() < 0.3)
    before = state(model)
    try:
        gated = linearize.convert(model, first[0].clone())
    except ConvertError as error:
        assert "activation" in str(error), made.source  # noqa: PT017 - nothing to gate is no failure
        return
    assert same_state(before, state(model)), made.source
    runs = [first, *(found for shape in other_shapes(made.shape, rng) if (found := run(model, shape)) is not None)]
    in_place = "inplace=True" in made.source or "_()" in made.source
    for x, expected in runs:
        assert difference(expected, outputs(gated, x.clone())) <= (ROUNDING if in_place else 0.0), made.source
    stir(gated, rng)
    moved = [(x, outputs(gated, x.clone())) for x, _ in runs]
    collapsed = linearize.collapse(gated, when=rng.choice(("always", "cheaper")))
    assert not linearize.gates(collapsed)
    for x, expected in moved:
        if finite(expected):
            assert difference(expected, outputs(collapsed, x.clone())) <= CLOSE, made.source


def build(made: Network) -> nn.Module:
    try:
        return made.build()
    except Exception as error:  # a mistake of the generator, to be seen with its work
        raise AssertionError(made.source) from error
