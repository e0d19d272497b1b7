"""Networks with state of every kind: the gated model is the same program, over several calls, in both modes.

A longer run: ``LINEARIZE_STATEFUL_FROM=1000 LINEARIZE_STATEFUL_TO=9000 pytest tests/test_stateful.py``.
"""

from __future__ import annotations

import copy
import os
import random
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import linearize
from linearize.errors import ConvertError
from tests.chain import error, outputs, randomize
from tests.stateful_networks import Stateful, stateful, transcript

SEEDS = range(int(os.environ.get("LINEARIZE_STATEFUL_FROM", "0")), int(os.environ.get("LINEARIZE_STATEFUL_TO", "40")))
# Gradients are summed in another order on the way through a gate; everything else is bitwise.
CLOSE = 1e-12


def differences(expected: Any, found: Any, *, close: float = 0.0) -> list[str]:
    """Where two transcripts differ; gradients (in dicts) may do so by `CLOSE`."""
    if isinstance(expected, dict):
        return [f"{k}: {d}" for k in expected for d in differences(expected[k], found.get(k), close=CLOSE)]
    if isinstance(expected, list):
        if len(expected) != len(found):
            return [f"{len(found)} entries instead of {len(expected)}"]
        pairs = enumerate(zip(expected, found, strict=True))
        return [f"[{i}] {d}" for i, (a, b) in pairs for d in differences(a, b, close=close)]
    if isinstance(expected, Tensor):
        if not isinstance(found, Tensor) or found.shape != expected.shape:
            return [f"{type(found).__name__} instead of {type(expected).__name__}"]
        expected, found = expected.detach(), found.detach()
        scale = float(expected.abs().max()) if expected.numel() else 0.0
        off = float((expected - found).abs().max()) if expected.numel() else 0.0
        same = torch.equal(expected, found) if not close else off <= close * max(scale, 1e-6)
        return [] if same else [f"off by {off:.2g} of {scale:.2g}"]
    return [] if expected == found else [f"{found!r} instead of {expected!r}"]


def given(made: Stateful) -> Tensor:
    return torch.randn(made.shape, generator=torch.Generator().manual_seed(made.seed), dtype=torch.float64)


def converted(model: nn.Module, x: Tensor, made: Stateful) -> nn.Module | None:
    """The gated model; None if none of its activations can get a gate."""
    try:
        return linearize.convert(model, x)
    except ConvertError as refusal:
        assert "can get a gate" in str(refusal), made.source  # noqa: PT017 - nothing to gate is no failure
        return None


@pytest.mark.parametrize("with_source", [True, False])
@pytest.mark.parametrize("seed", SEEDS)
def test_the_gated_model_is_the_same_program(seed: int, with_source: bool) -> None:
    made = stateful(seed)
    x = given(made)
    # Each with globals and closures of its own.
    twin, model, other = (made.build(with_source=with_source) for _ in range(3))
    gated = converted(model, x, made)
    if gated is None:
        return
    linearize.convert(other, x)
    expected = transcript(twin, x)
    assert not differences(expected, transcript(other, x)), made.source  # the user's model is as it was
    assert not differences(expected, transcript(copy.deepcopy(gated), x)), made.source


@pytest.mark.parametrize("seed", SEEDS)
def test_gated_is_collapsed(seed: int) -> None:
    made = stateful(seed)
    x, rng = given(made), random.Random(seed)  # noqa: S311 - not for secrets
    gated = converted(made.build(), x, made)
    if gated is None:
        return
    randomize(gated, rng.choice((0.5, 1.0)), seed=seed)
    collapsed = linearize.collapse(gated, when=rng.choice(("always", "cheaper")))
    for call in range(2):
        found = []
        for model in (gated, collapsed):
            random.seed(call)
            torch.manual_seed(call)
            found.append(outputs(model, x))
        if "CALLS.append" not in made.source and "@counted" not in made.source:  # shared by both
            assert error(*found) <= 1e-10, made.source


@pytest.mark.parametrize(("with_source", "least"), [(True, 15), (False, 2)])
@pytest.mark.slow
def test_most_networks_get_gates(with_source: bool, least: int) -> None:
    """Otherwise the tests above would show nothing."""
    made = [stateful(seed) for seed in range(20)]
    gated = [converted(one.build(with_source=with_source), given(one), one) for one in made]
    assert sum(model is not None for model in gated) >= least
