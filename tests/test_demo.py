"""The demo: that it runs to its end, on very little."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent


def test_demo_runs_to_its_end(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "demo.py"), "--quick", "--out", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}  # as if installed
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert "accuracy collapsed" in done.stdout
    assert "latency ratio, batch 64" in done.stdout
    reports = json.loads((tmp_path / "report.json").read_text())
    assert len(reports) == 2
    for report in reports.values():
        assert report["share"] == pytest.approx(0.75, abs=1e-3)
        assert report["verification"]["passed"]
        assert report["reloaded_error"] <= 1e-5
        assert Path(report["compressed"]).stat().st_size < Path(report["original"]).stat().st_size
    # What is drawn is judged where the figure can be seen: tests/test_compress.py.
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")
