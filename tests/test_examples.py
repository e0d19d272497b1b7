"""The notebooks run from their first cell to their last, and hold what a fresh run prints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = sorted((Path(__file__).parent.parent / "examples").glob("*.ipynb"))


def test_there_are_notebooks() -> None:
    assert len(EXAMPLES) >= 2


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
@pytest.mark.slow
def test_a_notebook_runs(path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("MPLBACKEND", "Agg")
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert all(cell["outputs"] or "print" not in "".join(cell["source"]) for cell in code), "saved without its outputs"
    names: dict[str, Any] = {}
    for cell in code:
        exec(compile("".join(cell["source"]), path.name, "exec"), names)  # noqa: S102 - our own notebook
    assert capsys.readouterr().out
