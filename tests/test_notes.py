"""An interrupted compression goes on where it stopped."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from linearize.compress import compress
from linearize.planning.resume import ResumeStore, fingerprint
from linearize.training.state import read_state, write_state
from tests.toys import QUIET


class Data:
    """Batches that count how often they are gone through, and can stop in the middle of a pass."""

    def __init__(self, stop_in: int | None = None) -> None:
        generator = torch.Generator().manual_seed(0)
        self.batches = [torch.randn(32, 6, generator=generator) for _ in range(6)]
        self.labels = [torch.randint(3, (32,), generator=generator) for _ in range(6)]
        self.passes, self.stop_in = 0, stop_in

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for index, pair in enumerate(zip(self.batches, self.labels, strict=True)):
            if index == 5:  # the first batches alone are read now and then, to see what they are
                self.passes += 1
                if self.passes == self.stop_in:
                    raise KeyboardInterrupt
            yield pair


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Linear(6, 8)]
    for _ in range(3):
        layers += [nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8))]
    return nn.Sequential(*layers, nn.Linear(8, 3)).eval()


@pytest.mark.slow
def test_statistics_are_not_gathered_twice(model: nn.Module, tmp_path: Path) -> None:
    options: dict[str, Any] = {"flops": 0.5, "sequential": True, "search": 0, **QUIET}
    whole = Data()
    expected = compress(model, whole, **options).model
    stopped = Data(stop_in=3)  # all statistics, the first site's refit; in the second's it is interrupted
    with pytest.raises(KeyboardInterrupt):
        compress(model, stopped, checkpoint_dir=tmp_path / "run", **options)
    assert len(list((tmp_path / "run").rglob("site-*"))) == len(list((tmp_path / "run").rglob("line-*"))) == 3
    assert len(list((tmp_path / "run").rglob("refit-*"))) == 1
    again = Data()
    found = compress(model, again, checkpoint_dir=tmp_path / "run", **options).model
    assert again.passes == whole.passes - 2
    for a, b in zip(expected.parameters(), found.parameters(), strict=True):
        assert torch.equal(a, b)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_another_model_and_damaged_files_are_not_taken_for_it(model: nn.Module, tmp_path: Path) -> None:
    options: dict[str, Any] = {"flops": 0.5, "sequential": True, **QUIET}
    with pytest.raises(KeyboardInterrupt):
        compress(model, Data(stop_in=4), checkpoint_dir=tmp_path / "run", **options)
    files = sorted((tmp_path / "run").rglob("*.safetensors"))
    files[0].write_bytes(files[0].read_bytes()[:100])
    with torch.no_grad():
        model[0].weight[0, 0] += 1e-3  # type: ignore[index]
    data = Data()
    found = compress(model, data, checkpoint_dir=tmp_path / "run", **options).model
    whole = Data()
    expected = compress(model, whole, **options).model
    assert data.passes == whole.passes
    for a, b in zip(expected.parameters(), found.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.slow
def test_fine_tuning_goes_on_with_its_plan(model: nn.Module, tmp_path: Path) -> None:
    options: dict[str, Any] = {"flops": 0.5, "finetune": {"epochs": 3, "lr": 1e-3}, **QUIET}
    expected = compress(model, Data(), **options).model

    def stop(line: str) -> None:
        if "epoch 2" in line:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compress(model, Data(), checkpoint_dir=tmp_path, **{**options, "progress": stop})
    assert list(tmp_path.rglob("training-*/epoch-*.safetensors"))
    (tmp_path / "precious.txt").write_text("mine")
    result = compress(model, Data(), checkpoint_dir=tmp_path, **options)
    assert len(result.report.history) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["precious.txt"]
    for a, b in zip(expected.parameters(), result.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_notes_by_name(tmp_path: Path) -> None:
    notes = ResumeStore(tmp_path / "notes", "one job")
    notes.write("thing", {"a.b": {"x": torch.ones(2)}, "a/b": {"x": torch.zeros(2)}})
    assert set(notes.some("thing", ["a.b", "a/b", "c"])) == {"a.b", "a/b"}
    assert float(notes.read("thing a/b")["x"].sum()) == 0  # type: ignore[index]
    assert ResumeStore(tmp_path / "notes", "another").read("thing a.b") is None
    notes.forget()
    assert notes.read("thing a.b") is None


def test_fingerprints_tell_jobs_apart() -> None:
    net = nn.Linear(3, 2)
    assert fingerprint(net, {"x": torch.ones(2)}) != fingerprint(net, {"x": torch.zeros(2)})
    before = fingerprint(net)
    with torch.no_grad():
        net.bias[0] += 1
    assert fingerprint(net) != before


def test_statistics_that_are_not_what_was_found_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The file's own checksum fits: somebody wrote other content, or put the file of one place in that of another."""
    store = ResumeStore(tmp_path / "notes", "one job")
    store.write("line", {"1": {"count": 3, "xx": torch.ones(2)}, "2": {"count": 3, "xx": torch.ones(2)}})
    first, second = sorted((tmp_path / "notes").iterdir())
    first_name, second_name = ("line 1", "line 2") if "line-1" in first.name else ("line 2", "line 1")
    kept = second.read_bytes()
    second.write_bytes(first.read_bytes())
    assert store.read(second_name) is None
    second.write_bytes(kept)
    assert store.read(second_name) is not None
    state = read_state(first)
    del state["noted"]["xx"]
    write_state(first, state)
    assert store.read(first_name) is None
    assert caplog.text.count("is damaged and left out") == 2
