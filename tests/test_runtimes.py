"""Latencies in other runtimes: the plan fits what will run, and the report says where it was measured."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

import linearize
from linearize.cli import app
from linearize.errors import ExportError, UsageError
from linearize.export.runtimes import runtime_of
from linearize.planning.request import Request
from tests.fixtures import Clock
from tests.toys import QUIET

INSTALLED = {"onnxruntime": "ONNX Runtime ", "openvino": "OpenVINO "}
DATA = list(torch.randn(5, 160, 16, generator=torch.Generator().manual_seed(0)).unbind())


@pytest.fixture(params=INSTALLED)
def name(request: pytest.FixtureRequest) -> str:
    for needed in ("onnxscript", "onnxruntime") if request.param == "onnxruntime" else (request.param,):
        pytest.importorskip(needed)
    return str(request.param)


def net(wide: int = 64) -> nn.Sequential:
    torch.manual_seed(0)
    first = [nn.Linear(16, wide), nn.GELU(), nn.Linear(wide, 24)]
    return nn.Sequential(*first, nn.Linear(24, wide), nn.GELU(), nn.Linear(wide, 16)).eval()


class Dear:
    """A runtime in which a multiplication by a matrix with an end of one size costs ten times as much as others."""

    def __init__(self, clock: Clock, size: int) -> None:
        self.clock, self.size, self.models = clock, size, list[str]()

    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[[], None]:
        self.models.append(type(model).__name__)
        matrices = [p.shape for p in model.parameters() if p.dim() == 2]
        seconds = 1e-4 + sum(a * b * (1e-5 if self.size in (a, b) else 1e-6) for a, b in matrices)
        return lambda: self.clock.sleep(seconds)


def test_the_plan_fits_the_runtime_that_it_is_for(clock: Clock) -> None:
    """Where one of two sites is dear, that one gets narrower; where it is the other, the other: a control of both."""
    torch.manual_seed(0)
    sizes = ((16, 64), (64, 16), (16, 24), (24, 64), (64, 24))
    maps = [nn.Linear(*size) for size in sizes]
    for layer in maps:  # so large that both activations bend what goes through them
        nn.init.normal_(layer.weight, std=2 * layer.in_features**-0.5)
    model = nn.Sequential(maps[0], nn.GELU(), *maps[1:4], nn.GELU(), maps[4]).eval()
    kept = {}
    for size in (16, 24):
        options: dict[str, Any] = {**QUIET, "families": ("channels",), "search": 0}
        result = linearize.compress(model, DATA, latency=0.6, runtime=Dear(clock, size), **options)
        numbers = {n: p.numel() for n, p in result.model.named_parameters()}
        kept[size] = [sum(numbers[n] for n in numbers if n[0] in layers) for layers in ("02", "46")]
        outcome = result.report.outcome
        assert outcome is not None
        assert outcome.met
        assert str(outcome).startswith("latency in the function Dear at 0.6 of the original's")
    assert kept[16][0] < kept[24][0]
    assert kept[24][1] < kept[16][1]


def test_what_is_reached_is_measured_there(clock: Clock) -> None:
    runtime = Dear(clock, 16)
    result = linearize.compress(net(), DATA, latency=0.5, runtime=runtime, rounds=3, progress=False, cache=False)
    outcome, timing = result.report.outcome, result.report.timing
    assert outcome is not None
    assert timing is not None

    def seconds(model: nn.Module) -> float:
        before = clock.now
        Dear(clock, 16)(model, (), {})()
        return clock.now - before

    assert outcome.reached == pytest.approx(seconds(result.model) / seconds(net()), rel=1e-6)
    assert timing.ratios[0].median == pytest.approx(outcome.reached, rel=1e-6)
    assert timing.environment["runtime"] == "the function Dear"
    assert "in the function Dear" in str(result.report)
    assert "Sequential" in runtime.models, "the whole model"
    assert set(runtime.models) - {"Sequential", "Identity"}, "layers by themselves"


@pytest.mark.slow
def test_real_runtimes_measure_real_models(name: str) -> None:
    """A hundred times as much work takes longer, wherever it is done, on any number of samples."""
    made = linearize.benchmark((net(1024), net(8)), DATA[0], runtime=name, rounds=3, batch_sizes=[1, 64])
    assert made.environment["runtime"].startswith(INSTALLED[name])
    assert INSTALLED[name] in str(made)
    assert made.ratios[1].median < 0.9
    assert [timing.batch_size for timing in made.timings] == [1, 1, 64, 64]


@pytest.mark.slow
def test_compress_in_a_real_runtime(name: str, tmp_path: Path) -> None:
    model = net(512)[:3]
    before = {key: value.clone() for key, value in model.state_dict().items()}
    options: dict[str, Any] = {"search": 0, "progress": False, "rounds": 3, "cache": tmp_path / "latency.json"}
    result = linearize.compress(model, DATA, latency=0.7, runtime=name, families=("channels",), **options)
    outcome, timing = result.report.outcome, result.report.timing
    assert outcome is not None
    assert timing is not None
    assert f"latency in {INSTALLED[name]}" in str(result.report)
    assert timing.environment["runtime"] == outcome.runtime
    assert json.loads(json.dumps(result.report.to_dict()))["budget"]["runtime"] == outcome.runtime
    assert json.loads((tmp_path / "latency.json").read_text()), "ratios are remembered"
    assert result.report.after.flops < result.report.before.flops
    assert result.report.verification
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    # What was measured is what is exported: the same function.
    (format_, suffix) = {"onnxruntime": ("onnx", "onnx"), "openvino": ("openvino", "xml")}[name]
    made = linearize.export(result.model, tmp_path / f"a.{suffix}", format=format_, example_inputs=DATA[0])
    assert made.proof is not None
    assert made.proof.error <= 1e-5


def test_a_session_serves_every_size_that_it_leaves_open(name: str) -> None:
    class Counted(nn.Linear):
        calls = 0

        def forward(self, input: Tensor) -> Tensor:
            Counted.calls += 1
            return super().forward(input)

    model = nn.Sequential(Counted(16, 16), nn.ReLU()).eval()
    runtime = runtime_of(name)
    first = runtime.run(model, ((DATA[0],), {}))
    traced = Counted.calls
    runtime.run(model, ((DATA[0][:3],), {}))()
    first()
    assert Counted.calls == traced, "exported once, and run elsewhere"


def test_what_cannot_be(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(match: str, kind: type[Exception] = UsageError, model: nn.Module | None = None, **options: Any) -> None:
        with pytest.raises(kind, match=match):
            linearize.compress(model or net(), DATA, latency=0.5, **QUIET, **options)

    refuse('runtime: found \'tensorrt\'. Pass one of "onnxruntime", "openvino", or a function', runtime="tensorrt")
    refuse("runtime: the function gave a NoneType.*Return a function", runtime=lambda *_: None)
    with pytest.raises(UsageError, match=r"compile: found beside runtime="):
        linearize.benchmark((net(), net()), DATA[0], runtime=Dear(clock, 16), compile=True)
    if importlib.util.find_spec("onnxscript") and importlib.util.find_spec("onnxruntime"):
        half = net().to(torch.bfloat16)
        with pytest.raises(ExportError, match=r"0.weight: is of torch.bfloat16.*cannot run in ONNX Runtime"):
            linearize.compress(half, [x.bfloat16() for x in DATA], latency=0.5, runtime="onnxruntime", **QUIET)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    for name, extra in {"onnxruntime": "onnx", "openvino": "openvino"}.items():
        with pytest.raises(UsageError, match=rf'is not installed. Install it: pip install "linearize\[{extra}\]"'):
            Request(latency=0.5, runtime=name)


@pytest.mark.slow
def test_on_the_command_line(name: str, tmp_path: Path) -> None:
    files = [str(tmp_path / f"{ratio}.safetensors") for ratio in (4, 1)]
    timm = pytest.importorskip("timm")
    for file, ratio in zip(files, (4, 1), strict=True):
        more = {"img_size": 16, "patch_size": 8, "num_classes": 3, "mlp_ratio": ratio}
        linearize.save(timm.create_model("test_vit", depth=1, **more).eval(), file)
    command = ["bench", *files, "--batch-sizes", "2", "--rounds", "2", "--runtime", name, "--json"]
    said = CliRunner().invoke(app, command)
    assert said.exit_code == 0, said.output
    told = json.loads(said.stdout[said.stdout.index("{") :])
    assert told["environment"]["runtime"].startswith(INSTALLED[name])
    wrong = CliRunner().invoke(app, [*command[:-2], "tensorrt"])
    assert isinstance(wrong.exception, UsageError | SystemExit)
    assert "--runtime" in (wrong.output + str(wrong.exception))
