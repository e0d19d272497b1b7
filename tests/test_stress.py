"""A slice of benchmarks/stress/networks.py, and that the program notices faults and runs that show nothing."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import linearize
from benchmarks.stress import chain
from benchmarks.stress.chain import Mismatch, check
from benchmarks.stress.mutants import MUTANTS, ROOT
from benchmarks.stress.networks import Tally, main, tally_of
from tests.random_features import FEATURES, add_feature
from tests.random_networks import Writer, network

pytestmark = pytest.mark.filterwarnings("ignore")
SEEDS = range(1_000_000, 1_000_040)  # no seeds of the published run


@pytest.mark.parametrize("start", range(SEEDS.start, SEEDS.stop, 10))
@pytest.mark.slow
def test_a_slice_of_random_networks(start: int) -> None:
    found = tally_of(range(start, start + 10))
    assert found.mismatches == []
    assert found.networks == 10
    assert found.reached["collapsed, loaded, without gradients"] >= 5
    assert found.collapsed >= 3


def test_every_feature_can_be_written_and_runs() -> None:
    for name, step in FEATURES.items():
        ran = 0
        for seed in range(8):

            def feature(writer: Writer, name: str = name, step: Any = step) -> str:
                step(writer)
                return name

            made = network(seed, feature)
            assert set(made.features) == {name}
            model = made.build()
            ran += bool(chain.batches_for(model, made.shape, random.Random(0)))  # noqa: S311 - not for secrets
        assert ran >= 4, name


def _shifted(model: nn.Module, *args: Any, **options: Any) -> nn.Module:
    small = COLLAPSE(model, *args, **options)
    with torch.no_grad():
        for parameter in small.parameters():
            parameter.mul_(1 + 1e-6)
    return small


COLLAPSE = linearize.collapse


@pytest.mark.slow
def test_a_wrong_collapse_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: weights that are off by a millionth."""
    monkeypatch.setattr(linearize, "collapse", _shifted)
    found = 0
    for seed in range(12):
        try:
            check(seed, network(seed, add_feature))
        except Mismatch as error:
            found += "collapsed" in str(error)
    assert found >= 6


def test_a_run_that_shows_nothing_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*_: Any, **__: Any) -> nn.Module:
        raise linearize.LinearizeError("model", "found no activation", "Pass another.")

    monkeypatch.setattr(linearize, "convert", refuses)
    found = tally_of(range(3))
    assert found.mismatches == []
    assert sum(found.refused.values()) == 3
    assert any("collapsed" in text for text in found.shortfalls())
    # The same through the program, from results that were written before: nothing is left to run.
    stored = tmp_path / "networks.json"
    stored.write_text(json.dumps({"seeds": [[0, 3]], **found.to_dict()}))
    assert main(["--to", "3", "--workers", "1", "--out", str(stored)]) == 1
    assert Tally(json.loads(stored.read_text())).to_dict() == found.to_dict()


def test_every_fault_can_still_be_put_in() -> None:
    """The list names text of the package; where that is gone, nothing would be tested."""
    for mutant in MUTANTS:
        text = (ROOT / "linearize" / mutant.file).read_text(encoding="utf-8")
        assert text.count(mutant.old) == 1, f"{mutant.file}: {mutant.old!r}"
        assert all((ROOT / "tests" / name).exists() for name in mutant.tests)
