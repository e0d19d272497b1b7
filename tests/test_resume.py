"""An interrupted run ends as one that was never interrupted: the same weights, bit for bit, and the same report."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import linearize
from benchmarks.stress import toys
from linearize.data.batches import Batches, Images, Transform
from linearize.errors import CheckpointError, LinearizeError, TrainingError, UsageError
from linearize.planning.decision import DECISION_FILE
from linearize.running.order import Repeated
from linearize.storage.folders import clear
from linearize.storage.lock import alone_in
from linearize.training.state import read_state, write_state


class Stop(Exception):
    pass


def stop_at(text: str, times: int = 1) -> Any:
    """Something to be told lines, that ends the run at the so-many-th that holds a text."""
    seen = 0

    def say(line: str) -> None:
        nonlocal seen
        seen += text in line
        if text and seen >= times and text in line:
            raise Stop

    return say


WAYS: dict[str, dict[str, Any]] = {
    "one by one": {},
    "gradual": {"sequential": False, "finetune": {"epochs": 2, "gradual": 0.5}},
    "share": {"flops": None, "linear": 0.5, "sequential": False},
    "units": {"flops": None, "activations": 0.5, "sequential": False, "epochs": 1},
    "without training": {"epochs": 0},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.slow
def test_compress_wherever_it_was_stopped(way: str, tmp_path: Path) -> None:
    lines: list[str] = []
    whole = toys.compress_job(None, progress=lines.append, **WAYS[way])
    for place, line in list(enumerate(lines))[1::4]:
        folder = tmp_path / str(place)
        with pytest.raises(Stop):
            toys.compress_job(folder, progress=stop_at(line, lines[: place + 1].count(line)), **WAYS[way])
        assert toys.compress_job(folder, **WAYS[way]) == whole, line
        assert not folder.exists()


def shuffled(own: bool) -> DataLoader[Any]:
    x, y = (torch.cat(some) for some in zip(*toys.data(), strict=True))
    generator = torch.Generator().manual_seed(3) if own else None
    return DataLoader(TensorDataset(x, y), batch_size=32, shuffle=True, generator=generator)


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("line", ["options", "plan", "refit", "fine-tune", "epoch 1"])
@pytest.mark.slow
def test_compress_on_shuffled_data(own: bool, line: str, tmp_path: Path) -> None:
    def job(folder: Path | None, say: Any = False, batches: Any = None) -> dict[str, Any]:
        options: dict[str, Any] = {"flops": 0.6, "search": 1, "rounds": 0, "cache": False, "sequential": True}
        data = shuffled(own) if batches is None else batches
        return toys.report_facts(
            linearize.compress(toys.network(), data, finetune=2, checkpoint_dir=folder, progress=say, **options)
        )

    whole = job(None)
    with pytest.raises(Stop):
        job(tmp_path / "run", stop_at(line))
    torch.manual_seed(123)  # another process, with other numbers drawn before
    loader = shuffled(own)
    assert job(tmp_path / "run", batches=loader) == whole
    if own:  # the caller's generator is where it was
        assert torch.equal(loader.generator.get_state(), shuffled(own).generator.get_state())


def test_global_random_numbers_go_on_where_they_were() -> None:
    import random

    import numpy as np

    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # type: ignore[index]  # noqa: NPY002
    toys.compress_job(None, epochs=1)
    after = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # type: ignore[index]  # noqa: NPY002
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]


# Fine-tuning


def images() -> Batches:
    pixels = torch.randint(0, 255, (48, 1, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return Batches(Images.of(pixels, torch.arange(48) % 3), 8, Transform((4, 4), 1), shuffle=True)


def classifier() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 3))


def test_a_finished_training_leaves_the_data_where_the_whole_run_does(tmp_path: Path) -> None:
    orders = []
    for _ in range(2):  # the second finds everything done
        data = images()
        linearize.finetune(classifier(), data, epochs=2, checkpoint_dir=tmp_path, resume=True, progress=False)
        orders.append([y.tolist() for _, y in data])
    assert orders[0] == orders[1]
    fresh = images()
    assert [y.tolist() for _, y in fresh] != orders[0]  # the next epoch is another one


def test_a_sampler_is_told_the_epoch() -> None:
    class Sampler(torch.utils.data.Sampler[int]):
        def __init__(self) -> None:
            self.epochs: list[int] = []

        def set_epoch(self, epoch: int) -> None:
            self.epochs.append(epoch)

        def __len__(self) -> int:
            return 16

        def __iter__(self) -> Iterator[int]:
            return iter(range(16))

    x, y = toys.data()[0]
    sampler = Sampler()
    loader = DataLoader(TensorDataset(x, y), batch_size=8, sampler=sampler)
    linearize.finetune(toys.network(), loader, epochs=2, progress=False)
    assert sampler.epochs == [0, 1, 2]


def test_damaged_checkpoints_are_left_out_with_a_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    whole = toys.finetune_job(tmp_path / "whole")
    for path in sorted((tmp_path / "whole").glob("epoch-*")):
        path.write_bytes(path.read_bytes()[:-1])
    with caplog.at_level(logging.WARNING, "linearize"):
        assert toys.finetune_job(tmp_path / "whole") == whole
    assert [record.levelname for record in caplog.records] == ["WARNING"] * 2
    assert all("is damaged and left out" in record.message for record in caplog.records)


def test_weights_of_another_type_are_no_checkpoint(tmp_path: Path) -> None:
    """Torch would turn them into numbers of the model's type without a word."""
    toys.finetune_job(tmp_path / "whole")
    for path in sorted((tmp_path / "whole").glob("epoch-*")):
        state = read_state(path)
        name = next(iter(state["run"]["model"]))
        state["run"]["model"][name] = state["run"]["model"][name].to(torch.int8)
        write_state(path, state)
    with pytest.raises(TrainingError, match=r"of type torch\.int8"):
        toys.finetune_job(tmp_path / "whole")


@pytest.mark.slow
def test_a_damaged_plan_is_made_again(tmp_path: Path) -> None:
    whole = toys.compress_job(None)
    with pytest.raises(Stop):
        toys.compress_job(tmp_path, progress=stop_at("epoch 1"))
    (noted,) = tmp_path.rglob(DECISION_FILE)
    noted.write_text(noted.read_text()[:100])
    assert toys.compress_job(tmp_path) == whole


def test_a_training_to_another_plan_is_not_gone_on_with(tmp_path: Path) -> None:
    """Its own folder, and a state that knows which channels it leads where."""
    options: dict[str, Any] = {"search": 0, "rounds": 0, "cache": False, "progress": False}
    tuned = {"epochs": 1, "checkpoint_dir": tmp_path, "resume": True}
    linearize.compress(toys.network(), toys.data(), flops=0.6, finetune=tuned, **options)
    with pytest.raises(TrainingError, match=r"another (plan|model)"):
        linearize.compress(toys.network(), toys.data(), flops=0.4, finetune=tuned, **options)


def test_the_users_own_folder_of_training_is_resumed_and_kept(tmp_path: Path) -> None:
    options: dict[str, Any] = {"flops": 0.6, "search": 0, "rounds": 0, "cache": False}
    tuned = {"epochs": 2, "checkpoint_dir": tmp_path, "resume": True}
    whole = linearize.compress(toys.network(), toys.data(), finetune=2, progress=False, **options)
    with pytest.raises(Stop):
        linearize.compress(toys.network(), toys.data(), finetune=tuned, progress=stop_at("epoch 1"), **options)
    lines: list[str] = []
    found = linearize.compress(toys.network(), toys.data(), finetune=tuned, progress=lines.append, **options)
    assert toys.report_facts(found) == toys.report_facts(whole)
    assert any("plan of the run" in line for line in lines)
    assert min(path.name for path in tmp_path.iterdir()).startswith("epoch-")
    with pytest.raises(UsageError, match="earlier run"):  # before the plan is made, not after
        linearize.compress(toys.network(), toys.data(), finetune={**tuned, "resume": False}, **options)


# Folders


HOLD = """
import sys, time
from pathlib import Path
from linearize.storage.lock import alone_in
with alone_in(Path(sys.argv[1]), "x"):
    print("in", flush=True)
    time.sleep(60)
"""


def test_two_processes_in_one_folder(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "in\n"
        with pytest.raises(UsageError, match="another process at work"):
            toys.finetune_job(tmp_path, epochs=1)
        other.kill()  # whatever ends it gives the folder free
        other.wait()
    assert toys.finetune_job(tmp_path, epochs=1)["steps"] == 12
    with alone_in(tmp_path, "x"), pytest.raises(UsageError, match="another process"), alone_in(tmp_path, "x"):
        pass


def test_places_that_cannot_be_written_are_found_before_any_training(tmp_path: Path, monkeypatch: Any) -> None:
    def no_step(*_: Any) -> None:
        raise AssertionError("trained")

    monkeypatch.setattr("linearize.training.loop.TrainingRun.update", no_step)
    file = tmp_path / "file"
    file.write_text("")
    for place, match in ((file, "no folder"), (file / "inside", "no folder"), ("a\0b", "path")):
        with pytest.raises(LinearizeError, match=match):
            linearize.finetune(toys.network(), toys.data(), checkpoint_dir=place, progress=False)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "touch", full)
    with pytest.raises(CheckpointError, match="No space left"):
        linearize.finetune(toys.network(), toys.data(), checkpoint_dir=tmp_path / "new", progress=False)
    with pytest.raises(CheckpointError, match="No space left"):
        toys.compress_job(tmp_path / "run")


def test_files_of_others_are_left_alone(tmp_path: Path) -> None:
    with pytest.raises(Stop):
        toys.compress_job(tmp_path / "run", progress=stop_at("epoch 1"))
    (own,) = (tmp_path / "run").iterdir()
    precious = [own / "thesis.txt", *(path / "notes.md" for path in own.iterdir() if path.is_dir())]
    for path in precious:
        path.write_text("mine")
    toys.compress_job(tmp_path / "run")
    assert sorted(path for path in own.rglob("*") if path.is_file()) == sorted(precious)


def test_leftovers_of_killed_runs_go(tmp_path: Path) -> None:
    names = (".epoch-0001.safetensors.1a2b.tmp", ".linearize-1a-22-3b.tmp", ".other.tmp")
    for name in names:
        (tmp_path / name).write_text("")
    clear(tmp_path, [r"epoch-(\d+)\.safetensors"])
    assert [path.name for path in tmp_path.iterdir()] == [".other.tmp"]


# Data


class Stream:
    """Batches without a length."""

    def __init__(self, batches: list[Any], *, ends: bool = True) -> None:
        self.batches, self.ends = batches, ends

    def __iter__(self) -> Iterator[Any]:
        yield from self.batches
        while not self.ends:
            yield self.batches[0]


def test_data_without_a_length_and_without_an_end(monkeypatch: Any) -> None:
    options: dict[str, Any] = {"flops": 0.6, "search": 0, "rounds": 0, "progress": False, "finetune": 1}
    found = linearize.compress(toys.network(), Stream(toys.data()), **options)
    whole = linearize.compress(toys.network(), toys.data(), **options)
    assert toys.report_facts(found) == toys.report_facts(whole)
    monkeypatch.setattr("linearize.running.batches._MOST", 50)
    with pytest.raises(linearize.DataError, match="more than 50 batches"):
        linearize.compress(toys.network(), Stream(toys.data(), ends=False), **options)


def test_passes_begin_alike() -> None:
    def first(batches: Any) -> Tensor:
        x: Tensor = next(iter(batches))[0]
        return x

    for own in (False, True):
        loader = shuffled(own)
        alike = Repeated(loader, seed=1)
        assert torch.equal(first(alike), first(alike))
        assert not torch.equal(first(loader), first(loader))
