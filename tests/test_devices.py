"""Models that are offloaded, dispatched or without values: said up front, and never moved."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import linearize
from linearize.running.devices import bring, check_whole, device_of, staying
from tests.toys import QUIET


def build() -> nn.Module:
    torch.manual_seed(0)
    parts = [nn.Linear(6, 24), nn.GELU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 6)]
    return nn.Sequential(*parts).eval()


X = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))


def _on_cpu(model: nn.Module) -> nn.Module:
    accelerate = pytest.importorskip("accelerate")
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    return model


def _on_disk(model: nn.Module) -> nn.Module:
    accelerate = pytest.importorskip("accelerate")
    places = {"0": "cpu", "1": "cpu", "2": "disk", "3": "cpu", "4": "cpu"}
    made: nn.Module = accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=tempfile.mkdtemp())
    return made


def _dispatched(model: nn.Module) -> nn.Module:
    accelerate = pytest.importorskip("accelerate")
    made: nn.Module = accelerate.dispatch_model(model, {"": "cpu"}, main_device="cpu", force_hooks=True)
    return made


def gated(model: nn.Module) -> nn.Module:
    made = linearize.convert(model, X)
    for gate in linearize.gates(made).values():
        gate.linearize_(torch.arange(24) < 8)
    return made


VERBS: dict[str, Callable[[nn.Module], Any]] = {
    "convert": lambda model: linearize.convert(model, X),
    "summary": lambda model: linearize.summary(model, X),
    "compress": lambda model: linearize.compress(model, [X] * 4, flops=0.7, **QUIET),
    "linear": lambda model: linearize.compress(model, [X] * 4, linear=0.3, **QUIET),
    "dry run": lambda model: linearize.compress(model, [X] * 4, flops=0.7, dry_run=True, **QUIET),
    "finetune": lambda model: linearize.finetune(model, [(X, X)], loss=nn.functional.mse_loss, progress=False),
    "benchmark": lambda model: linearize.benchmark((model, model), X, rounds=1),
    "save": lambda model: linearize.save(model, tempfile.mkdtemp() + "/m.safetensors"),
}


def works(model: nn.Module) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(X)
        return out


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("offload", [_on_cpu, _on_disk])
def test_offloaded_models_are_refused_and_stay(offload: Callable[[nn.Module], nn.Module], verb: str) -> None:
    model, expected = offload(build()), works(build())
    places = {name: parameter.device for name, parameter in model.named_parameters()}
    with pytest.raises(linearize.LinearizeError, match=r"meta device.*(Load|offload)") as caught:
        VERBS[verb](model)
    assert caught.value.where in places
    assert torch.equal(works(model), expected)
    assert places == {name: parameter.device for name, parameter in model.named_parameters()}


@pytest.mark.filterwarnings("ignore")
def test_an_offloaded_model_can_be_verified() -> None:
    small = _on_cpu(linearize.collapse(gated(build())))
    assert device_of(small) == torch.device("cpu")
    assert linearize.verify(gated(build()), small, X)
    assert not linearize.verify(build(), small, X)


def test_a_gated_model_that_is_offloaded_is_not_calibrated() -> None:
    model = _on_cpu(gated(build()))
    with pytest.raises(linearize.UsageError, match="offloaded"):
        linearize.calibrate(model, [X], progress=False)
    with pytest.raises(linearize.CollapseError, match="no values"):
        linearize.collapse(model)


@pytest.mark.filterwarnings("ignore")
def test_hooks_on_a_whole_model_are_no_obstacle_to_running() -> None:
    model = _dispatched(build())
    expected = works(build())
    result = linearize.compress(model, [X] * 4, flops=0.7, **QUIET)
    assert "hook of accelerate" in str(result.report)
    assert torch.equal(works(result.model), expected)
    assert torch.equal(works(model), expected)


def test_parts_without_values() -> None:
    model = build()
    model[2] = nn.Linear(24, 24, device="meta")  # type: ignore[operator]
    for verb in ("convert", "compress", "benchmark"):
        with pytest.raises(linearize.UsageError, match=r"2.weight: is on meta, and 0.weight is on cpu"):
            VERBS[verb](model)


def test_a_model_on_the_meta_device() -> None:
    model = build().to("meta")
    assert linearize.gates(linearize.convert(model, X.to("meta")))
    for verb in ("compress", "linear", "finetune", "benchmark"):
        with pytest.raises(linearize.UsageError, match="no values"):
            VERBS[verb](model)


def test_buffers_may_lie_elsewhere() -> None:
    model = build()
    model.register_buffer("scale", torch.ones(1, device="meta"))
    check_whole(model)


def test_what_was_moved_comes_back() -> None:
    model = build()
    kept = model.state_dict()
    with staying(model):
        assert device_of(model).type == "cpu"
    assert all(torch.equal(kept[name], value) for name, value in model.state_dict().items())
    away = build()
    with staying(away):
        away.to("meta").to_empty(device="cpu")
    bring(away, torch.device("meta"))
    assert device_of(away).type == "meta"


@pytest.mark.filterwarnings("ignore")
def test_hooked_models_are_not_brought_anywhere() -> None:
    model = _dispatched(build())
    bring(model, torch.device("meta"))
    assert device_of(model).type == "cpu"
    assert torch.equal(works(model), works(build()))
