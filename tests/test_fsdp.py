"""Gates under FSDP2: alphas are spread over processes, and priors come to what one process comes to."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fsdp import KINDS, network, trained

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_priors_under_fsdp_do_what_they_do_in_one_process(tmp_path: Path) -> None:
    count = 3
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = []
    for rank in range(count):
        place = {"RANK": str(rank), "WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        environment = {**os.environ, **place, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-W", "ignore", "-m", "tests.fsdp", str(tmp_path)]
        started.append(subprocess.Popen(command, cwd=ROOT, env=environment))
    assert [process.wait(timeout=200) for process in started] == [0] * count
    told = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(count)]
    assert all(other == told[0] for other in told)  # to the last bit
    for name, options in KINDS.items():
        for attached in (False, True):
            alone = trained(network(), options, lambda x: x, attached=attached)
            found = told[0][f"{name}, {attached}"]
            assert found["frozen"] == alone["frozen"], name
            assert found["share"] == alone["share"]
            assert found["alphas"] == pytest.approx(alone["alphas"], rel=1e-9, abs=1e-12)
    for verb in ("summary", "collapse", "save", "calibrate"):
        assert "is sharded over processes" in told[0][verb]
        assert "whole_state" in told[0][verb]
    assert told[0]["off"] < 1e-12
    assert told[0]["collapsed"]
