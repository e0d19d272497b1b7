"""Bad input: an error of ours that names the place, what was found and what to do; the model stays as it was."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import linearize
from linearize.errors import (
    CaptureError,
    CollapseError,
    ConvertError,
    LinearizeError,
    UsageError,
)
from linearize.plan import Plan, SitePlan
from linearize.surgery.form_choice import make_plan
from tests.chain import error, outputs, randomize
from tests.toys import make, shaken

X = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 5))


def half(model: nn.Module | None = None) -> nn.Module:
    """A converted model with half of its channels linear."""
    gated = linearize.convert(mlp() if model is None else model, X)
    randomize(gated, 0.5)
    return gated


def with_nan(model: nn.Module, name: str, value: float = float("nan")) -> nn.Module:
    model.get_parameter(name).data.view(-1)[0] = value
    return model


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.net(x if bool(x.sum() > 0) else -x)
        return y


class Wandering(nn.Module):
    """Control flow on data around layers of its own: no part of it can be captured by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.act, self.b = nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.b(self.act(self.a(x if bool(x.sum() > 0) else -x)))
        return y


class Failing(nn.Module):
    """It fails only after its children ran."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.norm = mlp(), nn.BatchNorm1d(5)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(self.net(x))
        if y.shape[0] == 3:
            raise ValueError("three is too many")
        return y


def uncopyable() -> nn.Module:
    model = mlp()
    model.lock = threading.Lock()  # type: ignore[assignment]
    return model


def with_a_scripted_part() -> nn.Module:
    return nn.Sequential(torch.jit.script(nn.Linear(6, 6)), nn.ReLU(), nn.Linear(6, 5))


# What is called, the error, and texts that its message must hold: the place, what was found, what to do.
CONVERT: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], type[LinearizeError], tuple[str, ...]]] = {
    "no activation": (lambda: nn.Linear(6, 3), {}, ConvertError, ("Linear", "no activation", "nn.ReLU")),
    "activation without channels": (nn.ReLU, {}, ConvertError, ("relu_0", "no linear map", "include=")),
    "wrong width": (
        lambda: nn.Sequential(nn.Linear(7, 3), nn.ReLU(), nn.Linear(3, 1)),
        {},
        CaptureError,
        ("Sequential", "(3, 6)", "example_inputs="),
    ),
    "wrong number of arguments": (
        mlp,
        {"example_inputs": (X, X)},
        CaptureError,
        ("Sequential", "2", "example_inputs="),
    ),
    "wrong keyword": (mlp, {"example_inputs": {"y": X}}, CaptureError, ("'y'", "example_inputs=")),
    "no arguments": (mlp, {"example_inputs": ()}, CaptureError, ("missing", "example_inputs=")),
    "no tensor": (mlp, {"example_inputs": "text"}, CaptureError, ("not str", "example_inputs=")),
    "unknown library": (mlp, {"example_inputs": None}, CaptureError, ("Sequential", "not known", "example_inputs=")),
    "failing forward": (Failing, {}, CaptureError, ("Failing", "three is too many", "example_inputs=")),
    "control flow on data": (Wandering, {}, CaptureError, ("Wandering", "torch.export", "control flow")),
    "NaN": (lambda: with_nan(mlp(), "2.weight"), {}, ConvertError, ("2.weight", "NaN", "Mend")),
    "Inf": (lambda: with_nan(mlp(), "0.bias", -float("inf")), {}, ConvertError, ("0.bias", "Inf", "Mend")),
    "include without a match": (
        mlp,
        {"include": "act*"},
        UsageError,
        ("include='act*'", "no site", "The sites are: 1"),
    ),
    "exclude without a match": (
        mlp,
        {"exclude": ["1", "7"]},
        UsageError,
        ("exclude='7'", "no site", "The sites are: 1"),
    ),
    "include is no pattern": (mlp, {"include": 3}, UsageError, ("include=", "3", "pattern")),
    "everything excluded": (mlp, {"exclude": "*"}, ConvertError, ("1: in exclude=", "exclude=")),
    "nothing included": (mlp, {"include": []}, ConvertError, ("not in include=",)),
    "scripted": (lambda: torch.jit.script(mlp()), {}, ConvertError, ("scripted", "eager")),
    "traced": (lambda: torch.jit.trace(mlp(), X), {}, ConvertError, ("scripted", "eager")),
    "scripted part": (with_a_scripted_part, {}, CaptureError, ("0:", "scripted", "eager")),
    "compiled": (lambda: torch.compile(mlp(), backend="eager"), {}, ConvertError, ("compiled", "eager")),  # type: ignore[dict-item, return-value]
    "gates already": (half, {}, ConvertError, ("has gates already", "once")),
    "not initialised": (lambda: nn.Sequential(nn.LazyLinear(4), nn.ReLU()), {}, ConvertError, ("0.weight", "batch")),
    "not to be copied": (uncopyable, {}, ConvertError, ("lock", "inplace=True")),
}


@pytest.mark.filterwarnings("ignore:`torch.jit", "ignore:Lazy modules")
@pytest.mark.parametrize("name", CONVERT)
def test_convert(name: str) -> None:
    build, options, kind, texts = CONVERT[name]
    model = build()
    before = snapshot(model)
    with pytest.raises(kind) as caught:
        linearize.convert(model, **{"example_inputs": X, **options})
    assert_clear(caught.value, texts)
    assert same(before, snapshot(model))


def snapshot(model: nn.Module) -> list[Any]:
    """Modules, modes, attributes and values."""
    modules: list[Any] = [(path, type(part), part.training, set(vars(part))) for path, part in model.named_modules()]
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    held = {k: v for k, v in tensors.items() if not isinstance(v, nn.parameter.UninitializedParameter)}
    return modules + [(name, tensor.detach().clone()) for name, tensor in held.items() if not tensor.is_meta]


def same(before: list[Any], after: list[Any]) -> bool:
    return len(before) == len(after) and all(
        a[0] == b[0] and torch.allclose(a[1], b[1], equal_nan=True) if isinstance(a[1], Tensor) else a == b
        for a, b in zip(before, after, strict=True)
    )


def assert_clear(caught: LinearizeError, texts: tuple[str, ...]) -> None:
    text = str(caught)
    assert all(part in text for part in texts), text
    assert caught.where
    assert caught.found
    assert caught.remedy.endswith(".") or caught.remedy.startswith("The sites are")
    assert "\n" not in text


@pytest.mark.parametrize("given", [3, None, torch.relu, "model"])
def test_no_module(given: Any) -> None:
    for function in (
        lambda: linearize.convert(given, X),
        lambda: linearize.collapse(given),
        lambda: linearize.summary(given),
    ):
        with pytest.raises(UsageError, match=type(given).__name__):
            function()
    with pytest.raises(UsageError, match="candidate"):
        linearize.verify(mlp(), given, X)


COLLAPSE: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], type[LinearizeError], tuple[str, ...]]] = {
    "no gates": (mlp, {}, CollapseError, ("Sequential", "no gates", "linearize.convert")),
    "collapsed already": (lambda: linearize.collapse(half()), {}, CollapseError, ("no gates",)),
    "NaN": (lambda: with_nan(half(), "2.weight"), {}, CollapseError, ("2.weight", "NaN", "Mend")),
    "Inf": (lambda: with_nan(half(), "0.bias", float("inf")), {}, CollapseError, ("0.bias", "Inf", "Mend")),
    "alpha above 1": (lambda: with_alpha(1.5), {}, CollapseError, ("1:", "alpha 1.5", "prior.step()")),
    "alpha below 0": (lambda: with_alpha(-0.5), {}, CollapseError, ("1:", "alpha -0.5", "prior.step()")),
    "alpha NaN": (lambda: with_alpha(float("nan")), {}, CollapseError, ("1:", "alpha nan", "prior.step()")),
    "unknown when": (half, {"when": "sometimes"}, UsageError, ("when", "'sometimes'", '"always"')),
    "meta device": (lambda: linearize.convert(mlp().to("meta"), X), {}, CollapseError, ("meta", "Load")),
    "compiled": (lambda: torch.compile(half(), backend="eager"), {}, ConvertError, ("compiled", "eager")),  # type: ignore[dict-item, return-value]
    "another layer": (
        lambda: replaced(nn.Sequential(nn.Linear(16, 5))),
        {},
        CollapseError,
        ("2:", "Sequential", "Convert"),
    ),
    "another width": (lambda: replaced(nn.Linear(12, 5)), {}, CollapseError, ("2:", "12 inputs", "16", "Convert")),
    "plan of other sites": (
        half,
        {"plan": Plan((SitePlan("act", "merged", (0,)),))},
        CollapseError,
        ("not in both", "Make the plan"),
    ),
    "plan with an unknown form": (
        half,
        {"plan": Plan((SitePlan("1", "melted", ()),))},
        CollapseError,
        ("1:", "'melted'"),
    ),
    "plan with other channels": (
        half,
        {"plan": Plan((SitePlan("1", "merged", (99,)),))},
        CollapseError,
        ("1:", "channel 99", "Make the plan"),
    ),
    "plan that cannot be": (half, {"plan": Plan((SitePlan("1", "vanished", ()),))}, CollapseError, ("Make the plan",)),
}


def with_alpha(value: float) -> nn.Module:
    model = half()
    gate = linearize.gates(model)["1"]
    gate.alpha.data[~gate.frozen] = value
    return model


def replaced(layer: nn.Module) -> nn.Module:
    model: Any = half()
    model[2] = layer
    return model


@pytest.mark.parametrize("name", COLLAPSE)
def test_collapse(name: str) -> None:
    build, options, kind, texts = COLLAPSE[name]
    model = build()
    before = snapshot(model)
    with pytest.raises(kind) as caught:
        linearize.collapse(model, **options)
    assert_clear(caught.value, texts)
    assert same(before, snapshot(model))


@pytest.mark.parametrize(
    "text", ["", "{}", '{"sites": [{"site": "1"}]}', '{"sites": [{"place": "1", "linear": []}]}', "[1]"]
)
def test_text_that_is_no_plan(text: str) -> None:
    with pytest.raises(UsageError, match=r"Plan\.from_json") as caught:
        Plan.from_json(text)
    assert "Plan.to_json" in str(caught.value)


def test_surrogate_that_is_not_finite() -> None:
    model = half()
    linearize.gates(model)["1"].slope[:] = float("nan")
    with pytest.raises(CollapseError, match="1: found NaN"):
        linearize.collapse(model)


def test_folded_weight_that_overflows() -> None:
    model = half(nn.Sequential(nn.Linear(6, 16), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 5))).half()
    with torch.no_grad():
        model.get_parameter("1.weight").fill_(6e4)
        model.get_parameter("3.weight").fill_(1.0)
    with pytest.raises(CollapseError, match=r"1\.weight: does not fit torch\.float16"):
        linearize.collapse(model, when="always")


def test_convert_in_place_leaves_the_model_on_failure() -> None:
    """The forward is rewritten before it turns out that no gate can stay."""
    model, inputs = make("functional_activations")
    before = snapshot(model)
    with pytest.raises(ConvertError):
        linearize.convert(model, inputs, exclude="*", inplace=True)
    with pytest.raises(UsageError):
        linearize.convert(model, inputs, include="nothing", inplace=True)
    assert same(before, snapshot(model))
    assert linearize.convert(model, inputs, inplace=True) is model


def test_running_statistics_stay_in_training_mode() -> None:
    """Neither a capture nor a dry run, nor the run that explains an error, trains the norm."""
    model = nn.Sequential(nn.Linear(6, 16), shaken(nn.BatchNorm1d(16)), nn.ReLU(inplace=True), nn.Linear(16, 5)).train()
    before = snapshot(model)
    linearize.convert(model, X)
    with pytest.raises(CaptureError):
        linearize.convert(model, torch.randn(3, 7))
    assert same(before, snapshot(model))


def test_attributes_set_by_a_forward_stay() -> None:
    """Not a fake tensor in their place."""

    class Remembering(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.calls = mlp(), 0
            self.register_buffer("last", torch.zeros(3, 5))

        def forward(self, x: Tensor) -> Tensor:
            self.seen = self.net(x)
            self.last = self.seen.detach()
            self.calls += 1
            return self.seen * 2

    model = Remembering()
    model(X)
    seen = model.seen
    assert seen.requires_grad
    gated: Any = linearize.convert(model, X)
    assert model.seen is seen
    assert model.calls == 1
    assert type(model.last) is Tensor
    randomize(gated, 0.5)
    expected = outputs(gated, X)
    collapsed: Any = linearize.collapse(gated)
    assert type(collapsed.last) is type(collapsed.seen) is Tensor
    assert error(expected, outputs(collapsed, X)) <= 1e-5


def test_tied_weights_are_reported() -> None:
    model, inputs = make("tied_weights")
    row = linearize.summary(model, inputs).sites[0]
    assert row.form == "partial activation"
    assert "shared with" in (row.reason or "")
    assert "fc" in (row.reason or "")


def test_wrappers_of_data_parallelism_come_off() -> None:
    model = mlp()
    gated = linearize.convert(nn.DataParallel(model), X)
    assert type(gated) is nn.Sequential
    randomize(gated, 0.5)
    expected = outputs(gated, X)
    wrapped = nn.DataParallel(gated)
    assert [row.name for row in linearize.summary(wrapped).sites] == ["1"]
    assert error(expected, outputs(linearize.collapse(wrapped), X)) <= 1e-5


def test_parts_converted_by_themselves() -> None:
    """The way out when the whole cannot be captured, as the error says."""
    model = Branching()
    model.net = linearize.convert(model.net, X)  # type: ignore[assignment]
    randomize(model, 0.5)
    expected = outputs(model, X)
    assert [row.name for row in linearize.summary(model).sites] == ["net.1"]
    collapsed = linearize.collapse(model)
    assert not linearize.gates(collapsed)
    assert error(expected, outputs(collapsed, X)) <= 1e-5
    with pytest.raises(CollapseError, match="its parts net"):
        linearize.collapse(model, plan=make_plan(model.net))


def test_inputs_move_to_the_model() -> None:
    """Inputs on the CPU, parameters without memory: the sites are found all the same."""
    row = linearize.summary(mlp().to("meta"), X).sites[0]
    assert (row.name, row.form) == ("1", "vanished")


@pytest.mark.parametrize("share", [0.0, 0.5])
@pytest.mark.parametrize(
    "name", ["mlp", "pooled_head", "conv_strided_dilated", "pointwise_then_padded", "gated_unit_by_keyword"]
)
def test_channels_on_their_way_are_kept(name: str, share: float) -> None:
    """A gate that stopped between activation and line is part of the function."""
    model, inputs = make(name, torch.float64)
    gated = linearize.convert(model, inputs)
    randomize(gated, share)
    for gate in linearize.gates(gated).values():
        gate.alpha.data[torch.rand(gate.channels) < 0.7] = 0.3
    expected = outputs(gated, inputs)
    for when in ("always", "cheaper"):
        with pytest.warns(UserWarning, match=r"channels have an alpha between 0 and 1.*round_\(\)"):
            collapsed = linearize.collapse(gated, when=when)
        assert not linearize.gates(collapsed)
        assert error(expected, outputs(collapsed, inputs)) <= 1e-12


def test_verify_names_what_is_wrong() -> None:
    with pytest.raises(UsageError, match=r"reference .* does not run"):
        linearize.verify(mlp(), mlp(), torch.randn(3, 9))
    with pytest.raises(UsageError, match=r"candidate .* does not run"):
        linearize.verify(mlp(), nn.Linear(9, 5), X)
    with pytest.raises(UsageError, match="empty list"):
        linearize.verify(mlp(), mlp(), [])
    assert not linearize.verify(mlp(), nn.Linear(6, 4), X)
