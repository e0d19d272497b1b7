"""What every family gathers about a language model merges exactly, however the data are split."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from linearize.convert import converted
from linearize.families.family import Context
from linearize.families.registry import FAMILIES
from linearize.running.passes import Collector, run_passes
from linearize.training.probes import projection
from tests.mixtures import mixtral, texts
from tests.test_passes import assert_same, tensors

COUNT = 5
BATCHES = texts(COUNT, length=12)


@cache
def subject() -> tuple[nn.Module, list[Collector]]:
    """A mixture of experts with gates, and all that its families want to know."""
    gated = converted(mixtral(), BATCHES[0])
    context = Context(gated, BATCHES[0], BATCHES[:2], "params")
    found: list[Collector] = []
    for family in FAMILIES:
        found += family.collectors(context, family.find(context))
    return gated, found


def gathered(indices: list[int]) -> list[Collector]:
    gated, pristine = subject()
    found = copy.deepcopy(pristine, {id(part): part for part in gated.modules()})
    some = [BATCHES[index] for index in indices]
    run_passes(gated, some, found, probe=projection, indices=indices, progress=False)
    return found


@cache
def whole() -> list[Collector]:
    return gathered(list(range(COUNT)))


def test_all_families_of_language_models_are_among_them() -> None:
    kinds = {collector.kind for collector in whole()}
    assert kinds == {"heads", "experts", "attention", "depth"}
    assert all(any(float(t.abs().max()) > 0 for t in tensors(c.state()) if t.numel()) for c in whole())


@settings(max_examples=8, deadline=None)
@given(st.lists(st.integers(0, 2), min_size=COUNT, max_size=COUNT), st.permutations(range(COUNT)))
def test_parts_of_the_data_merge_to_the_whole(parts: list[int], order: list[int]) -> None:
    shares = [[index for index in order if parts[index] == part] for part in range(3)]
    first, *others = [gathered(share) for share in shares if share]
    for other in others:
        for a, b in zip(first, other, strict=True):
            a.merge(b)
    assert_same(first, whole(), 1e-12)


def test_a_state_comes_back() -> None:
    gated, pristine = subject()
    again = copy.deepcopy(pristine, {id(part): part for part in gated.modules()})
    for collector, known in zip(again, whole(), strict=True):
        collector.restore(known.state())
    assert_same(again, whole(), 0.0)


def largest(values: list[Tensor]) -> float:
    return max((float(value.abs().max()) for value in values if value.numel()), default=0.0)


def test_a_part_that_is_missing_shows() -> None:
    """Otherwise the test above would show nothing."""
    part: list[Any] = gathered([0, 1])
    differs = [largest(tensors(a.state())) != largest(tensors(b.state())) for a, b in zip(part, whole(), strict=True)]
    assert sum(differs) > len(differs) / 2
