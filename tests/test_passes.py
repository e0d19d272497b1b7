"""One pass serves every statistic, and parts of the data merge to the whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import linearize
from linearize.calibrate import line_collectors
from linearize.errors import DataError
from linearize.families.blocks.collect import BlockCollector
from linearize.families.blocks.find import blocks_of
from linearize.families.channels.collect import site_collectors
from linearize.families.lines.collect import UnitCollector
from linearize.families.modules.collect import ModuleCollector
from linearize.families.modules.find import wholes_of
from linearize.gating.gate import gates
from linearize.gating.groups import groups_of
from linearize.running.passes import Collector, in_passes, run_passes
from linearize.training.probes import projection


def network() -> nn.Module:
    """Patches, a depthwise chain that is a block, a module that is one map, and matrices: all kinds of collectors."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 12, 1), nn.ReLU(), nn.Conv2d(12, 12, 3, padding=1, groups=12), nn.ReLU(), nn.Conv2d(12, 4, 1),
        nn.Conv2d(4, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4)), nn.Linear(4, 3),
    ).double().eval()  # fmt: skip


GATED = linearize.convert(network(), torch.zeros(2, 3, 9, 9, dtype=torch.float64))
BATCHES = [torch.randn(4, 3, 9, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(i)) for i in range(7)]


def everything() -> list[Collector]:
    found: list[Collector] = [*line_collectors(GATED), *site_collectors(GATED)]
    found += [BlockCollector(block) for block in blocks_of(GATED, groups_of(GATED))]
    found += [ModuleCollector(whole) for whole in wholes_of(GATED, BATCHES[0], groups_of(GATED))]
    found += [UnitCollector(name, gate) for name, gate in gates(GATED).items()]
    return found


def gathered(indices: list[int], **options: Any) -> list[Collector]:
    found = everything()
    some = [BATCHES[index] for index in indices]
    run_passes(GATED, some, found, probe=projection, indices=indices, progress=False, **options)
    return found


def tensors(value: Any) -> list[Tensor]:
    if isinstance(value, dict):
        return [t for key in sorted(value, key=str) for t in tensors(value[key])]
    if isinstance(value, Tensor):
        return [value.double()]
    return [torch.tensor(float(value), dtype=torch.float64)] if isinstance(value, int | float) else []


def assert_same(some: list[Collector], others: list[Collector], tolerance: float) -> None:
    for a, b in zip(some, others, strict=True):
        assert (a.kind, a.name) == (b.kind, b.name)
        for x, y in zip(tensors(a.state()), tensors(b.state()), strict=True):
            assert float((x - y).abs().max() if x.numel() else 0) <= tolerance * max(1.0, float(y.abs().max())), a.name


WHOLE = gathered(list(range(7)))


def test_every_kind_of_collector_is_among_them() -> None:
    assert {collector.kind for collector in WHOLE} == {"line", "site", "block", "module", "unit"}
    assert all(any(float(t.abs().max()) > 0 for t in tensors(c.state()) if t.numel()) for c in WHOLE)


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(0, 2), min_size=7, max_size=7), st.permutations(range(7)))
def test_parts_of_the_data_merge_to_the_whole(parts: list[int], order: list[int]) -> None:
    shares = [[index for index in order if parts[index] == part] for part in range(3)]
    found = [gathered(share) for share in shares if share]
    first = found[0]
    for other in found[1:]:
        for a, b in zip(first, other, strict=True):
            a.merge(b)
    assert_same(first, WHOLE, 1e-12)


def test_what_is_found_does_not_depend_on_which_share_a_pass() -> None:
    sizes = [collector.memory for collector in everything()]
    assert len(list(in_passes(everything(), sum(sizes) / 3))) > 2
    assert_same(gathered(list(range(7)), memory=sum(sizes) / 3), WHOLE, 1e-12)


def test_a_state_comes_back() -> None:
    again = everything()
    for collector, known in zip(again, WHOLE, strict=True):
        collector.restore(known.state())
    assert_same(again, WHOLE, 0.0)


@pytest.mark.parametrize("change", [lambda now: now.seed, lambda now: now.index])
def test_random_draws_belong_to_seed_batch_and_name(change: Callable[[Any], int]) -> None:
    other = gathered([1, 0, 2, 3, 4, 5, 6])
    assert_same(other, WHOLE, 1e-12)  # another order, the same draws
    seeded = gathered(list(range(7)), seed=1)
    assert any(
        not torch.allclose(x, y)
        for a, b in zip(seeded, WHOLE, strict=True)
        for x, y in zip(tensors(a.state()), tensors(b.state()), strict=True)
    )


class Noted(dict[str, dict[str, Any]]):
    def some(self, kind: str, names: Any) -> dict[str, Any]:
        return {name: self[kind][name] for name in names if name in self.get(kind, {})}

    def write(self, kind: str, noted: Any) -> None:
        self.setdefault(kind, {}).update(noted)


def test_passes_go_on_where_they_stopped() -> None:
    notes, found = Noted(), everything()
    run_passes(GATED, BATCHES, found[:5], probe=projection, progress=False, store=notes)
    passes = 0

    class Counted(list[Tensor]):
        def __iter__(self) -> Any:
            nonlocal passes
            passes += 1
            return super().__iter__()

    again = everything()
    run_passes(GATED, Counted(BATCHES), again, probe=projection, progress=False, store=notes)
    assert_same(again, WHOLE, 1e-12)
    assert passes == 1
    run_passes(GATED, Counted(BATCHES), everything(), probe=projection, progress=False, store=notes)
    assert passes == 1  # nothing was left to find out


def test_bad_data_is_named() -> None:
    bad = BATCHES[1].clone()
    bad[0, 0, 0, 0] = float("nan")
    with pytest.raises(DataError, match="batch 1"):
        run_passes(GATED, [BATCHES[0], bad], everything(), probe=projection, progress=False)
    with pytest.raises(DataError, match="no batches"):
        run_passes(GATED, [], everything(), probe=projection, progress=False)
    with pytest.raises(DataError, match="batch 0 does not go through"):
        run_passes(GATED, [torch.zeros(1, 7)], everything(), probe=projection, progress=False)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in GATED.modules())
