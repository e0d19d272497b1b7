"""Weights that are computed: weight norm and spectral norm, old and new, pruning, standardised weights."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations, parametrize, prune

import linearize
from linearize.running.copies import duplicate
from linearize.surgery.bake import bake
from linearize.tensors import held, is_computed, meddler

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.nn.utils.weight_norm:FutureWarning")

Wrap = Callable[[nn.Module], nn.Module]


class _Halved(nn.Module):
    """A parametrization of somebody's own."""

    def forward(self, weight: Tensor) -> Tensor:
        return 0.5 * weight + 0.01


class _Standardised(nn.Conv2d):
    """A convolution whose forward standardises its weight, as in BiT."""

    def forward(self, input: Tensor) -> Tensor:
        w = self.weight
        w = (w - w.mean((1, 2, 3), keepdim=True)) / (w.var((1, 2, 3), keepdim=True, unbiased=False) + 1e-5).sqrt()
        return functional.conv2d(input, w, self.bias, self.stride, self.padding, self.dilation, self.groups)


def _standardised(layer: Any) -> nn.Module:
    kwargs = {name: getattr(layer, name) for name in ("stride", "padding", "groups")}
    made = _Standardised(layer.in_channels, layer.out_channels, layer.kernel_size, **kwargs)
    made.load_state_dict(layer.state_dict())
    return made


def _both(layer: nn.Module) -> nn.Module:
    parametrize.register_parametrization(layer, "weight", _Halved())
    return parametrize.register_parametrization(layer, "bias", _Halved())


KINDS: dict[str, Wrap] = {
    "weight_norm, old": nn.utils.weight_norm,
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm, old": nn.utils.spectral_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "prune": lambda layer: prune.random_unstructured(layer, "weight", 0.4),
    "prune, bias too": lambda layer: prune.l1_unstructured(prune.l1_unstructured(layer, "weight", 0.3), "bias", 2),
    "weight and bias": _both,
    "standardised": _standardised,
}


class Residual(nn.Module):
    """x + a block, whose maps may be grouped in between."""

    def __init__(self, wrap: Wrap, groups: int = 1) -> None:
        super().__init__()
        self.expand, self.act = wrap(nn.Conv2d(8, 24, 1)), nn.SiLU()
        self.middle, self.act2 = wrap(nn.Conv2d(24, 24, 3, padding=1, groups=groups)), nn.ReLU()
        self.project = wrap(nn.Conv2d(24, 8, 1))

    def forward(self, x: Tensor) -> Tensor:
        h = self.act(self.expand(x))
        out: Tensor = x + self.project(self.act2(self.middle(h)))
        return out


def build(kind: str, *, groups: int = 1) -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(*(Residual(KINDS[kind], groups) for _ in range(2)), nn.Conv2d(8, 3, 1))


def data(count: int = 4, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.randn(4, 8, 6, 6, generator=torch.Generator().manual_seed(seed)).to(dtype) for seed in range(count)]


def halve(gated: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    for gate in linearize.gates(gated).values():
        gate.linearize_(torch.rand(gate.channels, generator=generator) < 0.5)
    return gated


def error(a: nn.Module, b: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        expected, found = (duplicate(model, linearize.LinearizeError).eval()(x) for model in (a, b))
        return float((found - expected).abs().max() / expected.abs().max())


def state_of(model: nn.Module) -> dict[str, Any]:
    """All that is of a model: tensors, flags, modes and hooks. A weight that a hook computes is of the last call."""
    tensors = {name: value.clone() for name, value in model.state_dict().items()}
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    modes = [module.training for module in model.modules()]
    hooks = [len(module._forward_pre_hooks) for module in model.modules()]
    attributes = {
        f"{path}.{name}": value.detach().clone()
        for path, module in model.named_modules()
        for name, value in vars(module).items()
        if isinstance(value, Tensor) and name not in ("weight", "bias")
    }
    return {"tensors": {**tensors, **attributes}, "flags": flags, "modes": modes, "hooks": hooks}


def assert_same(a: dict[str, Any], b: dict[str, Any]) -> None:
    assert a["tensors"].keys() == b["tensors"].keys()
    changed = [name for name, value in a["tensors"].items() if not torch.equal(value, b["tensors"][name])]
    assert not changed
    assert {name: a[name] for name in ("flags", "modes", "hooks")} == {n: b[n] for n in ("flags", "modes", "hooks")}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_exact_chain(kind: str, training: bool, tmp_path: Path) -> None:
    model, x = build(kind).double().train(training), data(1, torch.float64)[0]
    before = state_of(model)
    gated = linearize.convert(model, x)
    assert_same(before, state_of(model))
    assert error(model, gated, x) == 0
    own = state_of(halve(gated))
    small = linearize.collapse(gated)
    assert_same(own, state_of(gated))  # reading weights in training mode leaves them as they are
    assert error(model, gated, x) > 1e-4  # the linear channels do change something
    assert error(gated, small, x) <= 1e-12
    assert all(parameter.requires_grad for parameter in small.parameters())
    linearize.save(small, tmp_path / "small.safetensors")
    loaded = linearize.load(tmp_path / "small.safetensors", model=build(kind).double())
    assert error(small, loaded, x) <= 1e-12


@pytest.mark.parametrize(
    ("kind", "groups"), [*((kind, 1) for kind in KINDS), ("spectral_norm", 24), ("prune", 24), ("standardised", 24)]
)
def test_budgets_find_options(kind: str, groups: int, tmp_path: Path) -> None:
    model, batches = build(kind, groups=groups).eval(), data(8)
    result = linearize.compress(model, batches, flops=0.6, rounds=0, progress=False, cache=False)
    assert result.report.outcome is not None
    assert result.report.outcome.met
    assert result.report.verification
    linearize.save(result.model, tmp_path / "small.safetensors")
    loaded = linearize.load(tmp_path / "small.safetensors", model=build(kind, groups=groups))
    assert error(result.model, loaded, batches[0]) <= 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_baked_is_the_same_function(kind: str) -> None:
    model, x = build(kind, groups=4).double().train(), data(1, torch.float64)[0]
    gated = linearize.convert(model, x)
    twin = duplicate(gated, linearize.LinearizeError)
    assert "0.expand" in bake(gated)
    assert not any(is_computed(gated.get_submodule(f"{i}.{name}")) for i in (0, 1) for name in ("expand", "project"))
    assert error(twin, gated, x) <= 1e-12


def test_frozen_weights_stay_frozen() -> None:
    model, x = build("prune").requires_grad_(False), data(1)[0]
    small = linearize.collapse(halve(linearize.convert(model, x)))
    assert not any(parameter.requires_grad for parameter in small.parameters())


def test_stale_weights_are_not_read() -> None:
    """An old-style hook computes its weight when the module is called: what lies there may be of another state."""
    model, x = build("weight_norm, old").eval(), data(1)[0]
    gated = halve(linearize.convert(model, x))
    with torch.no_grad():
        for name, parameter in gated.named_parameters():
            if name.endswith("weight_g"):
                parameter.mul_(2)
    assert error(gated, linearize.collapse(gated), x) <= 1e-5


def test_reading_takes_no_step() -> None:
    layer: Any = parametrizations.spectral_norm(nn.Linear(4, 4)).train()
    steps = layer.parametrizations["weight"][0]._u.clone()
    assert held(layer, "weight") is not None
    assert torch.equal(layer.parametrizations["weight"][0]._u, steps)
    assert layer.weight is not None  # the negative control: reading it as it is does
    assert not torch.equal(layer.parametrizations["weight"][0]._u, steps)


def test_a_hook_beside_the_computing_one_is_seen() -> None:
    layer = nn.utils.weight_norm(nn.Linear(4, 4))
    assert meddler(layer) is None
    layer.register_forward_pre_hook(lambda *_: None)
    assert meddler(layer) == "a hook"
    net = nn.Sequential(layer, nn.ReLU(), nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2))
    gated = halve(linearize.convert(net, torch.randn(2, 4)))
    collapsed = linearize.collapse(gated, when="always")
    assert len(collapsed.get_submodule("0")._forward_pre_hooks) == 2


VERBS: dict[str, Callable[[nn.Module], Any]] = {
    "summary": lambda model: linearize.summary(model, data(1)[0]),
    "compress": lambda model: linearize.compress(model, data(8), flops=0.7, rounds=0, progress=False, cache=False),
    "linear": lambda model: linearize.compress(model, data(8), linear=0.3, rounds=0, progress=False, cache=False),
    "verify": lambda model: linearize.verify(model, model, data(1)[0]),
    "benchmark": lambda model: linearize.benchmark((model, model), data(1)[0], rounds=1, warmup=0),
    "save": lambda model: linearize.save(model, os.devnull + "/nowhere"),
    "path length": lambda model: linearize.average_path_length(model, data(1)[0]),
}


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("kind", ["spectral_norm, old", "spectral_norm"])
def test_no_verb_changes_the_model(kind: str, verb: str) -> None:
    model = build(kind).train()
    before = state_of(model)
    with contextlib.suppress(linearize.CheckpointError):
        VERBS[verb](model)
    assert_same(before, state_of(model))


def _plainly(model: nn.Module) -> nn.Module:
    """The same model after its users have taken the computation off, as one does before deploying."""
    for module in model.modules():
        for name in ("weight", "bias"):
            if parametrize.is_parametrized(module, name):
                parametrize.remove_parametrizations(module, name)
            elif prune.is_pruned(module) and f"{name}_orig" in module._parameters:
                prune.remove(module, name)
            elif f"{name}_g" in module._parameters:
                nn.utils.remove_weight_norm(module, name)
            elif f"{name}_orig" in module._parameters:
                nn.utils.remove_spectral_norm(module, name)
    return model


@pytest.mark.parametrize("edited", [False, True])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "standardised"])
def test_a_file_of_plain_weights_is_loaded_onto_the_model_as_it_is_built(
    kind: str, edited: bool, tmp_path: Path
) -> None:
    model, x = _plainly(build(kind).eval()), data(1)[0]
    saved = linearize.collapse(halve(linearize.convert(model, x, include="1.*"))) if edited else model
    linearize.save(saved, tmp_path / "plain.safetensors")
    base = build(kind)
    before = state_of(base)
    loaded = linearize.load(tmp_path / "plain.safetensors", model=base)
    assert_same(before, state_of(base))
    assert error(saved, loaded, x) <= 1e-6
    assert not any(is_computed(loaded.get_submodule(path)) for path in ("0.expand", "1.project"))
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    assert not any(module._forward_pre_hooks for module in loaded.modules())


def test_a_file_of_computed_weights_does_not_fit_a_plain_model(tmp_path: Path) -> None:
    linearize.save(build("weight_norm"), tmp_path / "computed.safetensors")
    with pytest.raises(linearize.CheckpointError, match=r"weight.*base model that it was made from"):
        linearize.load(tmp_path / "computed.safetensors", model=_plainly(build("weight_norm")))
