"""Paths that are no plain file, files of killed runs, and writes of many threads at once."""

from __future__ import annotations

import json
import os
import socket
import stat
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest
import torch
from torch import nn

from linearize import Plan
from linearize.checkpoint import load, save
from linearize.errors import CheckpointError, LinearizeError, UsageError
from linearize.planning.timing.table import LatencyTable
from linearize.storage import atomic


def test_save_leaves_pipes_sockets_and_devices_as_they_are(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as opened:
        opened.bind(str(tmp_path / "socket"))
    (tmp_path / "link").symlink_to("/dev/null")
    for name, clue in (("pipe", "named pipe"), ("socket", "socket"), ("link", "device")):
        before = (tmp_path / name).stat().st_ino
        for action in (lambda path: save(nn.Linear(2, 2), path), lambda path: load(path, model=nn.Linear(2, 2))):
            with pytest.raises(CheckpointError, match=clue):
                action(tmp_path / name)
        assert (tmp_path / name).stat().st_ino == before


def test_save_keeps_the_mode_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    save(nn.Linear(2, 2), path)
    path.chmod(0o600)
    save(nn.Linear(2, 2), path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    path.unlink()
    save(nn.Linear(2, 2), path)
    assert stat.S_IMODE(path.stat().st_mode) != 0o600 or os.umask(0o077) == 0o077  # control: not always so


def test_a_folder_that_can_be_written_and_not_read() -> None:
    code = (
        "import os, sys, torch; from linearize.checkpoint import save\n"
        "if os.getuid() == 0: os.setuid(65534)\n"  # root may read every folder
        "save(torch.nn.Linear(2, 2), sys.argv[1])"
    )
    with tempfile.TemporaryDirectory() as above:  # pytest's own folders let no other user pass
        folder = Path(above) / "blind"
        folder.mkdir()
        Path(above).chmod(0o777)
        folder.chmod(0o333)
        command = [sys.executable, "-c", code, str(folder / "m.safetensors")]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        folder.chmod(0o777)
        assert done.returncode == 0, done.stderr
        assert [path.name for path in folder.iterdir()] == ["m.safetensors"]


@pytest.mark.parametrize("path", ["a" * 300, "a\0b", "file/x", "missing/" + "b" * 300])
def test_paths_that_can_be_no_file(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    for action in (lambda: save(nn.Linear(2, 2), path), lambda: load(path)):
        with pytest.raises((CheckpointError, UsageError)):
            action()
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_what_killed_runs_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    ended = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    dead, host = int(ended.stdout), atomic._host()
    stale = [f".linearize-{host}-{dead}-0123abcd.tmp", ".m.safetensors.0123abcd.tmp"]
    kept = [
        f".linearize-{host}-{os.getpid()}-0123abcd.tmp",  # of a process that lives
        f".linearize-00000000-{dead}-0123abcd.tmp",  # of another machine
        ".other.0123abcd.tmp",
        "notes.tmp",
    ]
    for name in (*stale, *kept):
        (tmp_path / name).write_bytes(b"x")
        os.utime(tmp_path / name, (0, 0))
    save(nn.Linear(2, 2), tmp_path / "m.safetensors")
    assert {path.name for path in tmp_path.iterdir()} == {*kept, "m.safetensors"}


def test_a_killed_save_leaves_nothing_behind_the_next_one(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys, torch; from linearize.storage import atomic;\n"
        "atomic.write_atomically(sys.argv[1], lambda file: os.kill(os.getpid(), signal.SIGKILL))"
    )
    path = tmp_path / "m.safetensors"
    save(nn.Linear(2, 2), path)
    old = path.read_bytes()
    subprocess.run([sys.executable, "-c", code, str(path)], check=False)
    assert len(list(tmp_path.iterdir())) == 2  # control: the killed run has left its file
    assert path.read_bytes() == old
    save(nn.Linear(2, 2), path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["m.safetensors"]


def test_checked_files(tmp_path: Path) -> None:
    path = tmp_path / "checked"
    atomic.write_checked(path, b"some bytes\nand more")
    assert atomic.read_checked(path) == b"some bytes\nand more"
    raw = path.read_bytes()
    for damaged in (raw[:-1], raw + b"x", b"", raw.replace(b"more", b"less")):
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match="checksum"):
            atomic.read_checked(path)
    with pytest.raises(CheckpointError, match="more than the 3 expected"):
        atomic.read_checked(path, limit=3)


def test_threads_that_save_one_table_never_show_a_broken_one(tmp_path: Path) -> None:
    path = tmp_path / "latency.json"
    LatencyTable(path, {"a": 1.0}).save()
    broken: list[Exception] = []

    def work(name: str) -> None:
        for number in range(40):
            table = LatencyTable.open(path)
            table.entries.update({f"{name}{number}{i}": 1.0 for i in range(100)})
            table.save()
            try:
                json.loads(path.read_text(encoding="utf-8"))
            except ValueError as error:
                broken.append(error)

    threads = [threading.Thread(target=work, args=(name,)) for name in "abc"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not broken
    assert [entry.name for entry in tmp_path.iterdir()] == ["latency.json"]


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        '{"a": 1' + "0" * 400 + "}",
        '{"a": NaN, "b": -1, "c": 1e300, "d": "x", "e": true}',
        "[1]",
        "12",
        "\0",
    ],
)
def test_tables_that_are_damaged(text: str, tmp_path: Path) -> None:
    path = tmp_path / "latency.json"
    path.write_text(text, encoding="utf-8")
    table = LatencyTable.open(path)
    assert table.entries == {}
    path.write_text('{"good": 0.5, "bad": NaN}', encoding="utf-8")
    assert LatencyTable.open(path).entries == {"good": 0.5}


def _plan(**changed: object) -> str:
    entry = {"site": "act", "form": "merged", "linear": [0, 1], "loss": 0.5, "channels": 4, **changed}
    return json.dumps({"sites": [entry]})


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000, "{", "null", '{"sites": 3}', '{"sites": [], "x": 1}', _plan(loss="x"), _plan(loss=float("nan")),
        _plan(loss=10**400), _plan(before=-1), _plan(after=None), _plan(linear=[True]), _plan(linear="01"),
        _plan(linear=[0, 9]), _plan(site=3), _plan(rank=2.5), _plan(reason=3), _plan(form=None), _plan(extra=1),
    ],
)  # fmt: skip
def test_plans_that_are_damaged(text: str) -> None:
    with pytest.raises(UsageError):
        Plan.from_json(text)


def test_a_plan_has_a_digest_that_tells_it_from_others() -> None:
    plan = Plan.from_json(_plan())
    assert str(plan)
    assert plan.sha256 == Plan.from_json(plan.to_json()).sha256
    assert plan.sha256 != Plan.from_json(_plan(linear=[0])).sha256


def test_errors_of_a_pickle_survive(tmp_path: Path) -> None:
    torch.save({"a": 1}, tmp_path / "x.safetensors")
    with pytest.raises(LinearizeError, match="not start like"):
        load(tmp_path / "x.safetensors")
