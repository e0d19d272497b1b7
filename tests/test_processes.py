"""Several processes work on one model: they merge what they find, decide alike, and none waits for one that is gone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.ranks import run_ranks
from tests.several import batches, calibrated, planned


def run(count: int, folder: Path, *cases: str) -> list[dict[str, Any]]:
    """What each of some processes came to, by case."""
    run_ranks("tests.several", count, *cases, folder)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(count)]


def close(found: Any, expected: Any) -> None:
    """Sums in another order."""
    assert found["plan"] == expected["plan"]
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-9)
    assert found["weights"] == pytest.approx(expected["weights"], rel=1e-9)


@pytest.mark.slow
def test_two_processes_do_what_one_does(tmp_path: Path) -> None:
    first, second = run(2, tmp_path, "same data", "uneven", "resume", "other weights", "shares", "an error")
    lines, plan = calibrated(batches()), planned(batches())
    for case in ("same data", "uneven", "resume", "shares"):
        assert first[case] == second[case]  # to the last bit
        if "lines" in first[case]:
            assert first[case]["lines"] == pytest.approx(lines, rel=1e-9, abs=1e-12)
    close(first["same data"]["plan"], plan)
    close(first["resume"]["plan"], plan)
    # Trials of the search are measured on the first process's share: others may win.
    assert first["shares"]["plan"]["loss"] == pytest.approx(plan["loss"], rel=0.2)
    for told in (first, second):
        assert "weights that differ between processes" in told["other weights"]["error"]
    assert "NaN" in second["an error"]["error"]
    assert "process 1" in first["an error"]["error"]


@pytest.mark.slow
def test_four_processes_do_what_one_does_and_see_that_one_dies(tmp_path: Path) -> None:
    found = run(4, tmp_path, "same data", "a process dies")
    assert all(other["same data"] == found[0]["same data"] for other in found)
    close(found[0]["same data"]["plan"], planned(batches()))
    assert "another process is gone" in found[0]["a process dies"]["error"]
    assert "a process dies" not in found[1]
