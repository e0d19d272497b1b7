"""Run one function on many names, each in a process with limits on time and memory; resume where it stopped.

The processes are forked from one that has the libraries loaded: importing them costs more than most models.
"""

from __future__ import annotations

import csv
import json
import logging
import os
import re
import resource
import select
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Record = dict[str, Any]


@dataclass
class Limits:
    """Of one process: seconds of wall time, and GiB of memory on top of what the libraries take."""

    seconds: int = 120
    gigabytes: float = 8.0


def sweep(
    names: Sequence[str],
    work: Callable[[str], Record],
    out: Path,
    *,
    fields: Sequence[str],
    workers: int = 1,
    limits: Limits | None = None,
    keep: bool = True,
) -> list[Record]:
    """The records of all names, in order. Those that `out` holds already are kept; the file grows with every result.

    With `keep=False` the given names run again, while the file's other records stay.
    A process that breaks a limit or dies gives a record with the reason as its `result`.
    """
    from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    limits = limits or Limits()
    done = read_records(out)
    waiting = [name for name in names if not keep or name not in done]
    running: dict[int, tuple[str, int, float]] = {}
    columns = (
        TextColumn("{task.description:<40.40}"),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns) as bar:
        task = bar.add_task("sweep", total=len(waiting))
        while waiting or running:
            while waiting and len(running) < workers:
                name = waiting.pop(0)
                child, reader = _start(name, work, limits)
                running[reader] = (name, child, time.monotonic())
            for reader in select.select(list(running), [], [], 1.0)[0]:
                name, child, _ = running.pop(reader)
                done[name] = _finish(name, child, reader)
                _write(out, fields, done)
                bar.update(task, advance=1, description=f"{name}: {done[name]['result']}")
            for _, child, start in running.values():
                if time.monotonic() - start > limits.seconds + 5:  # a process that does not heed its alarm
                    with suppress(ProcessLookupError):
                        os.kill(child, signal.SIGKILL)
    return [done[name] for name in names]


def _start(name: str, work: Callable[[str], Record], limits: Limits) -> tuple[int, int]:
    reader, writer = os.pipe()
    child = os.fork()
    if child:
        os.close(writer)
        return child, reader
    os.close(reader)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limit = used + int(limits.gigabytes * 2**30)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(limits.seconds)
    logging.disable(logging.CRITICAL)  # torch prints whole graphs when it cannot capture a model
    try:
        record = work(name)
    except BaseException as error:  # the parent must hear of everything
        record = {"name": name, "result": f"crash: {type(error).__name__}: {' '.join(str(error).split())}"[:300]}
    record = {key: without_paths(value) if isinstance(value, str) else value for key, value in record.items()}
    with os.fdopen(writer, "wb") as pipe:
        pipe.write(json.dumps(record).encode())
    os._exit(0)


def without_paths(text: str) -> str:
    """A message without the folders of this machine.

    Example:
        >>> without_paths("no x in <module 'lib.a' from '/home/me/lib/a.py'> and/or b")
        "no x in <module 'lib.a' from '.../a.py'> and/or b"
    """
    return re.sub(r"(?<!\w)/(?:[\w.+-]+/)+", ".../", text)


def _finish(name: str, child: int, reader: int) -> Record:
    with os.fdopen(reader, "rb") as pipe:
        text = pipe.read()
    _, status = os.waitpid(child, 0)
    if text:
        record: Record = json.loads(text)
        return record
    stopped = os.WIFSIGNALED(status) and os.WTERMSIG(status) in (signal.SIGALRM, signal.SIGKILL)
    return {"name": name, "result": "time limit" if stopped else f"the process died with status {status}"}


def read_records(out: Path) -> dict[str, Record]:
    """The records of a file, by name; none if there is no such file."""
    if not out.exists():
        return {}
    with out.open(newline="") as file:
        return {row["name"]: dict(row) for row in csv.DictReader(file)}


def _write(out: Path, fields: Sequence[str], done: dict[str, Record]) -> None:
    """Beside the old file, then over it: an interrupted sweep loses nothing."""
    beside = out.with_suffix(".part")
    with beside.open("w", newline="") as file:
        writer = csv.DictWriter(file, fields, restval="", extrasaction="ignore")
        writer.writeheader()
        writer.writerows(done[name] for name in sorted(done))
    beside.replace(out)
