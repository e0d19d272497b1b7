"""A slice of the stress program of faults: the same cases, some of each kind."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
import torch

import linearize
from benchmarks.stress import damage, faults, toys, wrong
from linearize.training.state import read_state, write_state


def seeded(seed: int) -> random.Random:
    return random.Random(seed)  # noqa: S311 - cases, no secrets


@pytest.mark.parametrize(("part", "count"), [("checkpoint", 10), ("notes", 5)])
@pytest.mark.slow
def test_damaged_files(part: str, count: int, tmp_path: Path) -> None:
    found = faults.run(part, count, faults.Tally(), tmp_path)
    assert sum(found.outcomes.values()) == count
    assert not found.bad
    assert found.outcomes["equal"] >= count - 2


def test_a_job_that_is_not_the_same_is_another_result(tmp_path: Path) -> None:
    """The comparison can fail: negative control."""
    assert toys.finetune_job(tmp_path / "a", epochs=1) != toys.finetune_job(tmp_path / "b", epochs=1, lr=2e-3)
    assert toys.compress_job(None, epochs=0) != toys.compress_job(None, epochs=0, flops=0.5)


def test_every_way_to_spoil_a_file_changes_it(tmp_path: Path) -> None:
    raw = seeded(0).randbytes(5000)
    for name, change in damage.BYTES.items():
        changed = [bytes(change(bytearray(raw), seeded(seed))) for seed in range(8)]
        assert any(other != raw for other in changed), name


def test_forged_content_has_a_checksum_that_fits(tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    write_state(path, {"a": torch.ones(3), "b": [1, 2.5, {"c": "text"}]})
    assert damage.forge(path, seeded(1))
    assert str(read_state(path)) != str({"a": torch.ones(3), "b": [1, 2.5, {"c": "text"}]})


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked")
@pytest.mark.filterwarnings("ignore:.*fork")  # newer Pythons warn of threads: these jobs use none
@pytest.mark.parametrize("name", ["save", "latency cache"])
def test_kills(name: str, tmp_path: Path) -> None:
    from benchmarks.stress import kills

    rng, killed = seeded(3), 0
    for _ in range(12):
        stopped, told = kills.kill(name, tmp_path / "run", rng)
        assert not told
        killed += stopped
    assert killed > 0


def test_wrong_calls(tmp_path: Path) -> None:
    found = faults.wrong_calls(tmp_path, every=7)
    assert found.done > 60
    assert found.outcomes == {"clean error": found.done}, found.bad


def test_wrong_calls_name_the_argument(tmp_path: Path) -> None:
    for name, call in list(wrong.calls(tmp_path))[::23]:
        function, _, argument = name.partition("(")
        if argument.startswith("model=") or not argument:
            continue
        with pytest.raises(linearize.LinearizeError) as caught:
            call()
        assert argument.partition("=")[0] in str(caught.value), (function, str(caught.value))
