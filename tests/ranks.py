"""Programs that run as several processes of one group."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def run_ranks(module: str, count: int, *arguments: str | Path) -> list[int]:
    """Start `python -m MODULE` as each of some ranks, as torchrun does; their exit codes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = []
    for rank in range(count):
        place = {"RANK": str(rank), "WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        environment = {**os.environ, **place, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-W", "ignore", "-m", module, *map(str, arguments)]
        started.append(subprocess.Popen(command, cwd=ROOT, env=environment))
    return [process.wait(timeout=300) for process in started]
