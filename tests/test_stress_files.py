"""A slice of `benchmarks/stress/files.py`: hostile files, plans and tables, and what the program counts."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

import pytest

from benchmarks.stress.file_mutations import mutated_file, mutated_json, split
from benchmarks.stress.files import RESULTS, Tally, sweep

pytest.importorskip("timm")
pytest.importorskip("transformers")

NOTHING = ("code", "network", "prompts", "reads", "foreign", "hang", "too much memory")


@pytest.mark.slow
def test_a_slice(tmp_path: Path) -> None:
    found = sweep({"file": 120, "plan": 60, "cache": 60}, 1, tmp_path / "found.json")
    bad = json.dumps(found["bad"], indent=1)
    assert {name: found["watched"][name] for name in NOTHING} == dict.fromkeys(NOTHING, 0), bad
    outcomes = found["outcomes"]
    assert sum(outcomes["file"].values()) == 120
    # The control: not all are refused, or the attacks would reach nothing behind the first check.
    assert outcomes["file"]["the same function"] >= 5
    assert outcomes["plan"]["a plan"] >= 3
    assert outcomes["cache"]["a table"] >= 30


def test_a_sweep_goes_on_where_it_stopped(tmp_path: Path) -> None:
    path = tmp_path / "found.json"
    tally = Tally(path, 3, again=False)
    tally.add("plan", 0, {"outcome": "refused", "seconds": 0.1, "memory": 0, "seen": {}})
    tally.save()
    assert Tally(path, 3, again=False).data["done"] == {"plan": 1}
    assert Tally(path, 4, again=False).data["done"] == {}
    assert Tally(path, 3, again=True).data["done"] == {}


def test_a_tally_counts_what_must_not_be(tmp_path: Path) -> None:
    tally = Tally(tmp_path / "found.json", 0, again=False)
    for outcome, more in (
        ("foreign", {}),
        ("hang", {}),
        ("killed", {}),
        ("refused", {"seen": {"code": ["x"], "network": ["y"]}}),
        ("refused", {"memory": 2**31}),
    ):
        tally.add("file", 0, {"outcome": outcome, **more})
    watched = tally.data["watched"]
    assert [watched[name] for name in NOTHING] == [1, 1, 0, 0, 1, 2, 1]
    assert len(tally.data["bad"]) == 5


def test_mutations_are_the_same_for_the_same_number_and_differ() -> None:
    header = {"__metadata__": {"recipe": "{}", "steps": "[]", "sites": "[]", "extras": "[]"}}
    header["w"] = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}  # type: ignore[dict-item]
    text = json.dumps(header).encode()
    raw = len(text).to_bytes(8, "little") + text + bytes(8)
    assert split(raw) == (header, bytes(8))
    made = [mutated_file(raw, raw, Random(n))[0] for n in range(200)]  # noqa: S311 - cases, not secrets
    assert made == [mutated_file(raw, raw, Random(n))[0] for n in range(200)]  # noqa: S311 - same
    assert len(set(made)) > 100
    assert sum(each != raw for each in made) > 190
    assert len({mutated_json('{"a": [1, 2]}', Random(n)) for n in range(100)}) > 50  # noqa: S311 - same


def test_the_published_figures_are_what_is_claimed() -> None:
    found = json.loads(RESULTS.read_text(encoding="utf-8"))
    assert found["done"]["plan"] == found["done"]["cache"] == 1000
    assert found["done"]["file"] >= 3000  # of 10 000: the sweep goes on where it stopped
    assert {name: found["watched"][name] for name in NOTHING} == dict.fromkeys(NOTHING, 0)
    assert found["bad"] == []
    assert not [name for name in found["outcomes"]["file"] if "fails" in name or "another one collapsed" in name]
