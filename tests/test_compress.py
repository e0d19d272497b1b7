"""compress: the whole way in one call."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import linearize
from linearize.compress import compress
from linearize.errors import DataError, UsageError
from linearize.report.compression import outcome_table
from linearize.report.pictures import draw
from tests.fixtures import heights, widths
from tests.toys import QUIET

Batches = list[tuple[Tensor, Tensor]]


@pytest.fixture
def data() -> Batches:
    x = torch.randn(8, 16, 6)
    return [(batch, (batch[:, 0] * batch[:, 1] > 0).long()) for batch in x]


@pytest.fixture
def model() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 32), nn.GELU(), nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 2))


def test_reaches_the_share_and_leaves_no_gate(model: nn.Module, data: Batches) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    result = compress(model, data, linear=0.5, finetune=3, evaluate=data, rounds=1, progress=False)
    assert result.report.summary.linear == 32
    assert linearize.gates(result.model) == {}
    assert linearize.gates(model) == {}
    assert not result.model.training
    assert model.training
    assert result.report.verification
    assert sum(len(site.linear) for site in result.plan.sites) == 32
    assert result.report.quality["accuracy"]["gated"] == result.report.quality["accuracy"]["collapsed"]
    assert {"before", "gated", "collapsed"} == set(result.report.quality["eval_loss"])
    assert len(result.report.history) == 3
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_all_channels_linear_is_one_layer(model: nn.Module, data: Batches) -> None:
    result = compress(model, data, linear=1.0, finetune=None, **QUIET)
    assert result.report.summary.share == 1
    assert result.report.after.flops < result.report.before.flops
    assert result.report.timing is None
    assert result.report.history == []


def test_without_training_the_most_linear_channels_go(model: nn.Module, data: Batches) -> None:
    with torch.no_grad():
        model[0].bias[:8] = 100  # type: ignore[index]
    result = compress(model, data, linear=8 / 64, finetune=None, **QUIET)
    assert {site.site: site.linear for site in result.plan.sites} == {"1": tuple(range(8)), "3": ()}


def test_same_seed_same_model_and_the_random_state_stays(model: nn.Module, data: Batches) -> None:
    state = torch.get_rng_state()
    first = compress(model, data, linear=0.5, finetune=2, seed=3, **QUIET)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(5)
    second = compress(model, data, linear=0.5, finetune=2, seed=3, **QUIET)
    assert all(torch.equal(a, b) for a, b in zip(first.model.parameters(), second.model.parameters(), strict=True))


def test_options_of_fine_tuning_and_a_function_that_judges(model: nn.Module, data: Batches) -> None:
    lines: list[str] = []
    result = compress(
        model,
        iter_without_length(data),
        linear=0.6,
        finetune={"epochs": 2, "lr": 1e-2},
        evaluate=lambda m: 0.5,
        distill=False,
        rounds=0,
        progress=lines.append,
    )
    assert result.report.quality == {"score": {"before": 0.5, "gated": 0.5, "collapsed": 0.5}}
    assert "distill" not in result.report.history[0]
    assert [line for line in lines if not line.startswith(" ")] == [
        "convert", "calibrate", "fine-tune", "collapse", "verify", "evaluate",
    ]  # fmt: skip
    assert sum("epoch" in line for line in lines) == 2


def iter_without_length(data: Batches) -> Any:
    class Endless:
        def __iter__(self) -> Any:
            return iter(data)

    return Endless()


def test_keyword_batches(data: Batches) -> None:
    class Keyword(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.act, self.down = nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 2)

        def forward(self, *, x: Tensor) -> dict[str, Tensor]:
            return {"logits": self.down(self.act(self.up(x)))}

    batches = [{"x": x, "labels": y} for x, y in data]
    result = compress(Keyword(), batches, linear=0.5, finetune=1, evaluate=batches, **QUIET)
    assert result.report.verification is not None
    assert result.report.verification.outputs[0].name == "logits"
    assert "accuracy" in result.report.quality


@pytest.mark.parametrize(
    ("options", "where"),
    [
        ({"linear": 0.0}, "linear"),
        ({"linear": 1.5}, "linear"),
        ({"linear": float("nan")}, "linear"),
        ({"linear": 0.5, "finetune": 0}, "finetune"),
        ({"linear": 0.5, "finetune": {"epochs": "many"}}, "finetune"),
        ({"linear": 0.5, "finetune": {"prior": None}}, "finetune"),
        ({"linear": 0.5, "finetune": {"epochs": 1, "nonsense": 2}}, "nonsense"),
        ({"linear": 0.5, "flops": 0.5}, "exactly one"),
        ({}, "exactly one"),
        ({"linear": 0.5, "dry_run": True}, "dry_run"),
        ({"flops": 0.5, "search": -1}, "search"),
        ({"latency": 0.5, "speedup": 2}, "2 budgets"),
        ({"flops": 0}, "flops"),
        ({"flops": 1.2}, "flops"),
        ({"params": float("nan")}, "params"),
        ({"activations": -0.1}, "activations"),
        ({"latency": "half"}, "latency"),
        ({"flops": True}, "flops"),
        ({"speedup": 0.9}, "speedup"),
        ({"speedup": float("inf")}, "speedup"),
        ({"flops": 0.5, "round_to": 0}, "round_to"),
        ({"flops": 0.5, "rounds": -1}, "rounds"),
        ({"flops": 0.5, "finetune": {"epochs": 1, "gradual": 2}}, "gradual"),
    ],
)
def test_arguments_out_of_range(model: nn.Module, data: Batches, options: dict[str, Any], where: str) -> None:
    with pytest.raises(UsageError, match=where):
        compress(model, data, **{**QUIET, **options})


def test_no_data(model: nn.Module) -> None:
    with pytest.raises(DataError, match="no batches"):
        compress(model, [], flops=0.5, **QUIET)


def test_report_as_table_json_and_picture(model: nn.Module, data: Batches, tmp_path: Path, drawn: list[Any]) -> None:
    report = compress(model, data, linear=0.6, evaluate=data, rounds=2, progress=False).report
    assert "latency ratio, batch 16" in str(report)
    assert "accuracy collapsed" in outcome_table({"one": report, "two": report})
    report.save(tmp_path / "report.json")
    stored = json.loads((tmp_path / "report.json").read_text())
    assert stored["cost"]["before"]["parameters"] == sum(p.numel() for p in model.parameters())
    pytest.importorskip("matplotlib")
    draw({"one": stored, "two": report.to_dict()}, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
    sites, gains, *again = drawn[0].axes
    assert [axes.get_title(loc="left") for axes in (sites, again[0])] == ["one", "two"]
    shares = [site["linear"] / site["channels"] for site in stored["sites"] if site["gated"]]
    assert heights(sites) == pytest.approx([1.0] * len(shares) + shares) == heights(again[0])
    assert sum(shares) == pytest.approx(0.6 * len(shares), abs=0.02)
    assert [text.get_text() for text in sites.get_xticklabels()] == ["1", "3"]
    before, after = stored["cost"]["before"], stored["cost"]["after"]
    names = [text.get_text() for text in gains.get_yticklabels()]
    assert names == ["latency, batch 16", "FLOPs", "parameters"]
    latency = stored["timing"]["ratios"][0]["median"]
    ratios = [latency, after["flops"] / before["flops"], after["parameters"] / before["parameters"]]
    assert widths(gains) == pytest.approx(ratios)
    with pytest.raises(UsageError, match="cannot be written"):
        draw({"one": stored}, tmp_path / "picture.nonsense")
    with pytest.raises(UsageError, match="reports"):
        draw({}, tmp_path / "picture.png")
