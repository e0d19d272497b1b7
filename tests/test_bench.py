"""benchmark: what is measured, that it is told in seconds, and that nothing stays changed."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from linearize.bench import benchmark
from linearize.errors import UsageError
from linearize.report.timing import quartiles
from tests.fixtures import Clock


class Sleeps(nn.Module):
    """Takes a known time, by a clock that nothing else moves."""

    def __init__(self, seconds: float, clock: Clock) -> None:
        super().__init__()
        self.sleep = clock.sleep
        self.seconds = seconds
        self.weight = nn.Parameter(torch.ones(1))
        self.sizes: list[int] = []
        self.dtypes: set[torch.dtype] = set()

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        self.sleep(self.seconds)
        self.sizes.append(x.shape[0])
        self.dtypes.add(x.dtype)
        return x * scale


def test_latency_is_in_seconds_and_the_ratio_follows(clock: Clock) -> None:
    result = benchmark((Sleeps(0.004, clock), Sleeps(0.002, clock)), torch.ones(1), rounds=3, warmup=0)
    slow, fast = result.timings
    assert [slow.q1, slow.median, slow.q3] == pytest.approx([0.004] * 3)
    assert fast.median == pytest.approx(0.002)
    (ratio,) = result.ratios
    assert (ratio.model, ratio.reference) == ("candidate", "reference")
    assert [ratio.q1, ratio.median, ratio.q3] == pytest.approx([0.5] * 3)


def test_real_time_passes_too() -> None:
    """Sleeping takes at least as long as it says: no upper bound, since the machine may be busy."""

    class Waits(nn.Identity):
        def forward(self, x: Tensor) -> Tensor:
            time.sleep(0.003)
            return x

    (timing, _) = benchmark((Waits(), nn.Identity()), torch.ones(1), rounds=3, warmup=0).timings
    assert timing.q1 >= 0.003


def test_runs_are_interleaved() -> None:
    log: list[str] = []

    class Logs(nn.Module):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.name = name

        def forward(self, x: Tensor) -> Tensor:
            log.append(self.name)
            time.sleep(0.03)
            return x

    benchmark({"a": Logs("a"), "b": Logs("b")}, torch.ones(1), rounds=4, warmup=0)
    assert "".join(log[-8:]) == "abbaabba"


def test_many_models_against_the_first() -> None:
    models = {"a": nn.Identity(), "b": nn.Identity(), "c": nn.Identity()}
    result = benchmark(models, torch.ones(1), rounds=1, warmup=0)
    assert [(r.model, r.reference) for r in result.ratios] == [("b", "a"), ("c", "a")]


def test_batch_sizes_repeat_and_cut_keyword_inputs(clock: Clock) -> None:
    model = Sleeps(0.02, clock)
    result = benchmark((model, model), {"x": torch.ones(2, 3), "scale": 2.0}, rounds=1, warmup=0, batch_sizes=[1, 5])
    assert set(model.sizes) == {1, 5}
    assert [t.batch_size for t in result.timings] == [1, 1, 5, 5]


def test_dtype_is_measured_on_copies() -> None:
    model = nn.Linear(2, 2)
    result = benchmark((model, model), torch.ones(1, 2), rounds=1, dtype=torch.bfloat16)
    assert result.environment["dtype"] == "bfloat16"
    assert model.weight.dtype == torch.float32


def test_threads_modes_and_gradients_are_put_back() -> None:
    seen: list[tuple[int, bool, bool]] = []

    class Looks(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append((torch.get_num_threads(), self.training, torch.is_grad_enabled()))
            return x

    before = torch.get_num_threads()
    model = Looks()
    result = benchmark((model, model), torch.ones(1), rounds=1, threads=before + 1)
    assert set(seen) == {(before + 1, False, False)}
    assert result.environment["threads"] == before + 1
    assert torch.get_num_threads() == before
    assert model.training
    assert torch.is_grad_enabled()


def test_threads_are_put_back_after_a_failure() -> None:
    before = torch.get_num_threads()
    with pytest.raises(UsageError, match="candidate"):
        benchmark((nn.Identity(), nn.Linear(3, 3)), torch.ones(1, 2), threads=before + 1)
    assert torch.get_num_threads() == before


def test_compiled_and_not(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[nn.Module] = []

    def compile_nothing(model: nn.Module) -> nn.Module:
        compiled.append(model)
        return model

    monkeypatch.setattr(torch, "compile", compile_nothing)
    model = nn.Identity()
    result = benchmark((model, model), torch.ones(1), rounds=1, compile=[False, True])
    assert [t.compiled for t in result.timings] == [False, False, True, True]
    assert compiled == [model, model]
    assert "yes" in str(result)


def test_json_next_to_the_table(tmp_path: Path) -> None:
    result = benchmark((nn.Identity(), nn.Identity()), torch.ones(1), rounds=2)
    result.save(tmp_path / "bench.json")
    data = json.loads((tmp_path / "bench.json").read_text())
    assert data["unit"] == "seconds"
    assert {"device", "threads", "torch", "dtype", "rounds"} <= set(data["environment"])
    assert len(data["timings"][0]["samples"]) == 2
    assert list(tmp_path.iterdir()) == [tmp_path / "bench.json"]
    assert "candidate" in str(result)
    with pytest.raises(UsageError, match="cannot be written"):
        result.save(tmp_path / "missing" / "bench.json")


@pytest.mark.parametrize(
    ("options", "where"),
    [
        ({"rounds": 0}, "rounds"),
        ({"warmup": -1}, "warmup"),
        ({"threads": 0}, "threads"),
        ({"batch_sizes": [0]}, "batch_sizes"),
        ({"batch_sizes": []}, "batch_sizes"),
    ],
)
def test_numbers_out_of_range(options: dict[str, Any], where: str) -> None:
    with pytest.raises(UsageError, match=where):
        benchmark((nn.Identity(), nn.Identity()), torch.ones(1), **options)


@pytest.mark.parametrize("models", [{}, {"a": 3}, (nn.Identity(), None)])
def test_what_is_no_model(models: Any) -> None:
    with pytest.raises(UsageError, match="models"):
        benchmark(models, torch.ones(1))


def test_one_batch_only() -> None:
    with pytest.raises(UsageError, match="2 batches"):
        benchmark((nn.Identity(), nn.Identity()), [torch.ones(1), torch.ones(1)])


def test_progress_is_told() -> None:
    lines: list[str] = []
    benchmark((nn.Identity(), nn.Identity()), torch.ones(2), rounds=1, progress=lines.append)
    assert lines == ["timing reference, candidate at batch size 2"]


def test_quartiles_of_one_value() -> None:
    assert quartiles([2.0]) == (2.0, 2.0, 2.0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_events_give_seconds() -> None:
    model = nn.Linear(256, 256).cuda()
    result = benchmark((model, model), torch.ones(8, 256), rounds=3)
    assert result.environment["device_type"] == "cuda"
    assert all(1e-7 < t.median < 1e-1 for t in result.timings)
