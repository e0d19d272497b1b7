"""What compress is given and cannot use: an error of ours that says what to do, before minutes are spent."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from linearize import bench
from linearize.compress import Result, compress
from linearize.errors import DataError, UsageError
from linearize.families.channels.fit import levels
from linearize.plan import Plan
from linearize.planning.resume import facts_of
from tests.toys import QUIET


@pytest.fixture
def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 16), nn.Linear(16, 64), nn.GELU(),
                         nn.Linear(64, 8))  # fmt: skip


@pytest.fixture
def data() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(64, 8, generator=generator) for _ in range(6)]


# Data


def test_a_batch_that_does_not_go_through_is_named(model: nn.Module, data: list[Tensor]) -> None:
    for wrong, index in (([*data, torch.randn(4, 9)], 6), ([x.double() for x in data], 0)):
        with pytest.raises(DataError, match=f"batch {index} does not go through the model"):
            compress(model, wrong, flops=0.5, **QUIET)
    with pytest.raises(DataError, match="no sample in batch 1"):
        compress(model, [data[0], torch.zeros(0, 8)], flops=0.5, **QUIET)


def test_missing_labels_are_told_in_terms_of_compress(model: nn.Module, data: list[Tensor]) -> None:
    with pytest.raises(DataError, match=r"pass finetune=.'distill_weight': 1.0. to learn from the original"):
        compress(model, data, flops=0.5, finetune=1, **QUIET)
    with pytest.raises(DataError, match="or pass a function of the model"):
        compress(model, data, flops=0.5, evaluate=data, **QUIET)


# Arguments


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"evaluate": 3}, "evaluate: found a int"),
        ({"seed": "a"}, "seed: found 'a'"),
        ({"finetune": {"gradual": "a"}}, "gradual: found 'a'"),
        ({"uniform": ["zzz*"]}, r"found 'zzz\*', which names no site. Sites are 1, 4"),
        ({"round_to": 0}, "round_to"),
        ({"plan": "{}", "flops": None}, "plan: found a str"),
        ({"linear": "x", "flops": None}, "linear: found 'x'"),
        ({"flops": np.bool_(1)}, "flops"),
    ],
)
def test_arguments(model: nn.Module, data: list[Tensor], options: dict[str, Any], match: str) -> None:
    with pytest.raises(UsageError, match=match):
        compress(model, data, **{"flops": 0.5, **options}, **QUIET)


def test_places(model: nn.Module, data: list[Tensor], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="is no folder"):
        compress(model, data, flops=0.5, checkpoint_dir=tmp_path / "file", **QUIET)
    with pytest.raises(UsageError, match="found a NoneType"):
        compress(None, data, flops=0.5, **QUIET)  # type: ignore[arg-type]
    with torch.inference_mode(), pytest.raises(UsageError, match="inference_mode"):
        compress(model, data, flops=0.5, **QUIET)


def test_nothing_to_train(model: nn.Module, data: list[Tensor]) -> None:
    options: dict[str, Any] = {"finetune": {"epochs": 1, "distill_weight": 1.0}, **QUIET}
    with pytest.raises(UsageError, match="no parameter that requires a gradient"):
        compress(model.requires_grad_(False), data, flops=0.5, **options)
    assert compress(model, data, flops=0.5, **QUIET).report.outcome is not None


def test_budgets_of_numpy_count(model: nn.Module, data: list[Tensor]) -> None:
    outcome = compress(model, data, flops=np.float32(0.5), **QUIET).report.outcome  # type: ignore[arg-type]
    assert outcome is not None
    assert outcome.met


def test_widths_are_multiples_of_what_is_asked(model: nn.Module, data: list[Tensor]) -> None:
    for channels, step in ((64, 24), (100, 8), (512, 64), (4, 8)):
        assert all(width % step == 0 and width < channels for width in levels(channels, step))
    result = compress(model, data, flops=0.45, round_to=32, **QUIET)
    assert {64 - len(site.linear) for site in result.plan.sites} <= {0, 32, 64}
    assert result.report.outcome is not None
    assert result.report.outcome.met


@pytest.mark.parametrize("smaller_is", ["slower", "faster"])
def test_a_latency_below_reach_is_no_slower_than_the_original(smaller_is: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where all that could be done takes longer than the original, the original is what comes back."""

    def seconds(model: nn.Module) -> float:
        size = 1e-9 + sum(p.numel() for p in model.parameters())
        return size if smaller_is == "faster" else 1 / size

    # Whole models are called by a partial; layers of the table by functions, which all take as long.
    monkeypatch.setattr(
        bench, "_measure", lambda run, *_: seconds(cast("nn.Module", run.func)) if isinstance(run, partial) else 1.0
    )
    torch.manual_seed(0)
    tiny = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    data = [torch.randn(4, 4)] * 20
    result = compress(tiny, data, latency=1e-3, progress=False, cache=False)
    outcome = result.report.outcome
    assert outcome is not None
    assert not outcome.met
    assert outcome.reached is not None
    assert outcome.reached == pytest.approx(seconds(result.model) / seconds(tiny))
    changed = [site.form for site in result.plan.sites if site.form != "unchanged"]
    if smaller_is == "slower":
        assert outcome.reached == 1
        assert not changed
        assert torch.equal(result.model(data[0]), tiny(data[0]))
    else:
        assert outcome.reached < 0.5
        assert changed


# Plans that were edited


@pytest.fixture
def replay(model: nn.Module, data: list[Tensor]) -> Callable[..., Result]:
    made = compress(model, data, flops=0.5, dry_run=True, **QUIET).plan.to_json()

    def run(**changes: Any) -> Result:
        read = json.loads(made)
        read["sites"][0].update(changes)
        return compress(model, data, plan=Plan.from_json(json.dumps(read)), **QUIET)

    return run


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"form": "banana"}, "found the form 'banana'; known are unchanged"),
        ({"linear": [-1]}, "found -1 among its linear channels"),
        ({"linear": [1, 1]}, "a channel twice among those that are linear"),
        ({"linear": [1.5]}, r"linear\[0\] is 1.5, not a whole number"),
        ({"linear": "abc"}, "linear is 'abc', not a list"),
        ({"linear": [64]}, "found 64 among"),
        ({"linear": [1], "dropped": [2]}, "channel 2 dropped, but not linear"),
        ({"rank": -3}, "found rank -3"),
        ({"rank": "x"}, "rank is 'x', not a whole number"),
        ({"rank": 10**6}, "found rank 1000000, and the largest is 8"),
        ({"site": "4"}, "it is there twice"),
        ({"site": 4}, "site is 4, not a text"),
        ({"other": 4}, "is 'other', not one of before"),
    ],
)
def test_nonsense_in_plans(replay: Callable[..., Result], changes: dict[str, Any], match: str) -> None:
    with pytest.raises(UsageError, match=match):
        replay(**changes)


def test_a_plan_of_another_width_is_refused(model: nn.Module, data: list[Tensor]) -> None:
    plan = compress(model, data, flops=0.5, **QUIET).plan
    other = nn.Sequential(nn.Linear(8, 96), nn.ReLU(), nn.Linear(96, 16), *list(model.children())[3:])
    with pytest.raises(UsageError, match="1: has 64 channels in the plan and 96 here"):
        compress(other, data, plan=plan, **QUIET)


def test_edits_that_change_the_form_go_through(replay: Callable[..., Result]) -> None:
    every = list(range(64))
    gone = replay(linear=every, dropped=every, form="factored", rank=0)
    assert gone.plan["1"].form == "vanished"
    skip = replay(linear=every, dropped=[], form="factored", rank=4)
    assert (skip.plan["1"].rank, len(skip.plan["1"].linear)) == (4, 64)
    text = str(skip.plan).splitlines()
    assert text[0].split() == ["site", "form", "nonlinear", "linear", "rank", "loss", "why", "not"]
    assert text[2].split()[:5] == ["1", "factored", "0", "64", "4"]


# Going on after an interruption


class Stop(Exception):
    pass


def loader(x: Tensor, *, shuffle: bool) -> DataLoader[Any]:
    return DataLoader(TensorDataset(x, (x[:, 0] > 0).long()), batch_size=32, shuffle=shuffle)


@pytest.mark.parametrize("shuffle", [False, True])
def test_a_shuffled_loader_goes_on_where_it_was(model: nn.Module, tmp_path: Path, shuffle: bool) -> None:
    lines: list[str] = []

    def stop_at(word: str) -> Callable[[str], None]:
        def say(line: str) -> None:
            lines.append(line)
            if word and word in line:
                raise Stop

        return say

    known = loader(torch.randn(256, 8, generator=torch.Generator().manual_seed(0)), shuffle=shuffle)
    options: dict[str, Any] = {"flops": 0.5, "checkpoint_dir": tmp_path, "rounds": 0, "cache": False}
    options |= {"finetune": {"epochs": 3}}
    with pytest.raises(Stop):
        compress(model, known, **options, progress=stop_at("epoch 2"))
    lines.clear()
    result = compress(model, known, **options, progress=stop_at(""))
    assert not any("epoch 1" in line for line in lines)
    assert len(result.report.history) == 3
    assert not list(tmp_path.glob("unfinished-*"))


def test_statistics_of_less_data_are_not_taken_for_those_of_more(model: nn.Module, tmp_path: Path) -> None:
    x = torch.randn(520, 8, generator=torch.Generator().manual_seed(0))
    lines: list[str] = []

    def stop(line: str) -> None:
        if line.strip() == "plan":
            raise Stop

    options: dict[str, Any] = {"flops": 0.5, "checkpoint_dir": tmp_path, "rounds": 0, "cache": False}
    with pytest.warns(UserWarning, match="full rank"), pytest.raises(Stop):
        compress(model, [x[:8]], **options, progress=stop)
    (old,) = tmp_path.glob("unfinished-*")
    more = compress(model, [x[:8], x[8:]], **options, progress=lines.append)
    alone = compress(model, [x[:8], x[8:]], flops=0.5, **QUIET)
    assert torch.equal(more.model(x), alone.model(x))
    assert any(f"nothing to resume: {old.name}" in line for line in lines)
    assert old.exists()


def test_facts_of_data() -> None:
    x = torch.randn(64, 8)
    assert facts_of(loader(x, shuffle=False))[3]
    assert facts_of(loader(x, shuffle=True))[:3] == facts_of(loader(x, shuffle=False))[:3]
    assert facts_of(loader(x, shuffle=True))[3] == []
    assert facts_of([x]) != facts_of([x, x])
