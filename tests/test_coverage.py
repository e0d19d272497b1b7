"""A fixed slice of the coverage sweep, and the machinery around it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.coverage import cases
from benchmarks.coverage.cases import Case, DoesNotRun, signature, timm_case, transformers_case
from benchmarks.coverage.check import fill
from benchmarks.coverage.pool import Limits, read_records, sweep
from benchmarks.coverage.report import write_report
from benchmarks.coverage.row import EQUAL, NOTHING, UNREACHED, Row
from benchmarks.coverage.tables import smallest_of, totals, verdict

pytestmark = pytest.mark.zoo

# One of each kind of thing that the graph analysis must understand; small, so that all of them take some minutes.
TIMM = (
    "botnet26t_256 cait_xxs24_224 coatnet_nano_rw_224 convnextv2_atto cs3darknet_focus_s eca_nfnet_l0 "
    "edgenext_xx_small efficientformer_l1 eva02_tiny_patch14_224 fastvit_t8 gmixer_12_224 hgnetv2_b0 levit_128s "
    "mixer_s32_224 mobilenetv4_conv_small poolformerv2_s12 regnetx_002 repvgg_a0 resnetv2_18 test_vit "
    "tf_efficientnet_lite0 xcit_nano_12_p8_224"
).split()
TRANSFORMERS = (
    "albert bart bert clip deberta-v2 distilbert falcon gemma gpt2 gpt_neox llama mamba marian mixtral mobilebert opt "
    "phi qwen2 roberta segformer t5 vit wav2vec2 whisper"
).split()
NO_GATE = {"mamba": UNREACHED, "mixtral": UNREACHED}


@pytest.mark.parametrize("name", TIMM)
def test_timm(name: str) -> None:
    row = fill(Row(name, ""), lambda: timm_case(name, 1000, shallow=True))
    assert not cases._DECODERS  # the library is as it was
    assert row.result == EQUAL, row
    assert row.gated > 0


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_transformers(name: str) -> None:
    row = fill(Row(name, ""), lambda: transformers_case(name))
    assert row.result == NO_GATE.get(name, EQUAL), row
    assert row.reasons or row.collapsible == row.activations


class Net(nn.Module):
    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.layers(x)
        return y


def case(*layers: nn.Module) -> Case:
    torch.manual_seed(0)
    return Case(Net(*layers).double().eval(), ((torch.randn(2, 4, dtype=torch.float64),), {}), "4")


def test_the_check_sees_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sweep's own negative controls: a function changed by collapsing, and a gate that changes it."""
    import linearize

    ffn = nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 4)
    assert fill(Row("net", ""), lambda: case(*ffn)).result.startswith(("equal", "CheckpointError"))
    true_collapse, true_convert = linearize.collapse, linearize.convert

    def wrong(model: nn.Module, **options: Any) -> nn.Module:
        result = true_collapse(model, **options)
        with torch.no_grad():
            next(result.parameters()).add_(1e-3)
        return result

    monkeypatch.setattr(linearize, "collapse", wrong)
    assert "collapsed differs" in fill(Row("net", ""), lambda: case(*ffn)).result
    monkeypatch.setattr(linearize, "collapse", true_collapse)

    def moved(model: nn.Module, inputs: Any) -> nn.Module:
        result = true_convert(model, inputs)
        with torch.no_grad():
            next(result.parameters()).mul_(1 + 1e-12)
        return result

    monkeypatch.setattr(linearize, "convert", moved)
    assert fill(Row("net", ""), lambda: case(*ffn)).result == "gated differs from the original"


def test_nothing_to_gate_and_what_does_not_run() -> None:
    assert fill(Row("net", ""), lambda: case(nn.Linear(4, 4))).result == NOTHING

    def none() -> Case:
        raise DoesNotRun("net", "it asks for a file", "See its page.")

    row = fill(Row("net", ""), none)
    assert row.result == "does not run: it asks for a file"
    assert verdict({"result": row.result}) == "does not run"


def test_signature_tells_settings_apart() -> None:
    same = [signature(Net(nn.Linear(4, 4), nn.LeakyReLU(0.1))) for _ in range(2)]
    assert same[0] == same[1]
    assert signature(Net(nn.Linear(4, 4), nn.LeakyReLU(0.2))) != same[0]
    assert signature(Net(nn.Linear(4, 5), nn.LeakyReLU(0.1))) != same[0]


def work(name: str) -> dict[str, Any]:
    if name == "slow":
        time.sleep(60)
    if name == "crash":
        raise ValueError("no such thing")
    return {"name": name, "result": "done"}


def test_sweep_survives_and_resumes(tmp_path: Path) -> None:
    out = tmp_path / "sweep.csv"
    limits = Limits(seconds=1)
    rows = sweep(["a", "slow", "crash"], work, out, fields=("name", "result"), workers=2, limits=limits)
    assert [row["result"] for row in rows] == ["done", "time limit", "crash: ValueError: no such thing"]
    assert set(read_records(out)) == {"a", "slow", "crash"}
    rows = sweep(["a", "b"], lambda name: {"name": name, "result": "new"}, out, fields=("name", "result"))
    assert [row["result"] for row in rows] == ["done", "new"]
    rows = sweep(["a"], lambda name: {"name": name, "result": "new"}, out, fields=("name", "result"), keep=False)
    assert rows[0]["result"] == "new"
    assert set(read_records(out)) == {"a", "slow", "crash", "b"}


def test_the_page_is_that_of_the_tables(tmp_path: Path) -> None:
    """docs/coverage.md is generated: nobody edits its numbers."""
    folder = Path(__file__).parents[1] / "benchmarks" / "coverage" / "results"
    page = write_report(folder, tmp_path / "coverage.md")
    assert page.read_text() == (folder.parents[2] / "docs" / "coverage.md").read_text()
    rows, small = read_records(folder / "timm.csv"), smallest_of(read_records(folder / "sizes.csv").values())
    assert totals([rows[name] for name in small.values()]).models == 98
