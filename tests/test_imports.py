"""Imports point one way: no circle, and none against the order of the rooms in docs/architecture.md."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def rooms() -> ModuleType:
    spec = importlib.util.spec_from_file_location("rooms", ROOT / "docs" / "rooms.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_no_import_goes_up(rooms: ModuleType) -> None:
    assert rooms.against() == []


def test_there_is_no_circle(rooms: ModuleType) -> None:
    assert rooms.circles() == []


def test_an_import_that_goes_up_and_a_circle_are_found(
    rooms: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in {
        "linearize/__init__.py": "",
        "linearize/low.py": "def f():\n    from linearize.high import x\n",
        "linearize/high.py": "from linearize import low\nx = 1\n",
        "docs/architecture.md": "## The rooms, from the ground up\n| `low` | |\n| `high`, `__init__` | |\n",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    monkeypatch.setattr(rooms, "ROOT", tmp_path)
    assert rooms.against() == ["low stands below high: linearize/low.py -> linearize.high"]
    assert [sorted(circle) for circle in rooms.circles()] == [["linearize.high", "linearize.low"]]


def test_importing_the_package_is_silent_and_brings_no_model_library() -> None:
    code = "import sys, linearize; print([n for n in ('timm', 'transformers', 'accelerate') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert done.stderr == ""


def test_files_are_no_longer_than_a_reader_holds() -> None:
    for path in (ROOT / "linearize").rglob("*.py"):
        name, size = path.relative_to(ROOT).as_posix(), len(path.read_text(encoding="utf-8").splitlines())
        assert size <= 300, name
