"""Every site that stays for another reason than its loss says so, in the plan and in the report."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import linearize
from linearize.compress import Result

Change = Callable[[nn.Module], object]


class Block(nn.Module):
    """x + project(act(norm(expand(x))))."""

    def __init__(self) -> None:
        super().__init__()
        self.expand, self.norm = nn.Conv2d(8, 32, 1, bias=False), nn.BatchNorm2d(32)
        self.act, self.project = nn.SiLU(), nn.Conv2d(32, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.project(self.act(self.norm(self.expand(x))))
        return out


BATCHES = [torch.randn(4, 8, 5, 5, generator=torch.Generator().manual_seed(seed)) for seed in range(6)]


def build() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(Block(), Block(), Block()).eval()


def compress(model: nn.Module, **kwargs: Any) -> Result:
    options = {"flops": 0.5, "rounds": 0, "progress": False, "cache": False, **kwargs}
    return linearize.compress(model, BATCHES, **options)


def _own_forward(module: nn.Module) -> None:
    module.forward = module.forward


def _accelerate(module: nn.Module) -> None:
    hooks = pytest.importorskip("accelerate.hooks")
    hooks.add_hook_to_module(module, hooks.AlignDevicesHook(execution_device="cpu", io_same_device=True))


HOOKS: dict[str, tuple[Change, str]] = {
    "forward hook": (lambda m: m.register_forward_hook(lambda *_: None), "a hook"),
    "forward pre-hook": (lambda m: m.register_forward_pre_hook(lambda *_: None), "a hook"),
    "with keywords": (lambda m: m.register_forward_pre_hook(lambda *_: None, with_kwargs=True), "a hook"),
    "backward hook": (lambda m: m.register_full_backward_hook(lambda *_: None), "a hook"),
    "backward pre-hook": (lambda m: m.register_full_backward_pre_hook(lambda *_: None), "a hook"),
    "own forward": (_own_forward, "a forward put on the object"),
    "accelerate": (_accelerate, "a hook of accelerate (AlignDevicesHook"),
}


CASES = [*((kind, "project") for kind in HOOKS), *(("forward hook", place) for place in ("expand", "norm", "act"))]


@pytest.mark.parametrize(("kind", "place"), CASES)
def test_a_hook_is_the_reason_and_is_kept(kind: str, place: str) -> None:
    change, said = HOOKS[kind]
    model = build()
    change(model.get_submodule(f"1.{place}"))
    result = compress(model)
    own = result.plan["1.act"]
    assert own.form == "unchanged"
    assert own.reason is not None
    assert f"1.{place}" in own.reason.replace("1.act.activation", "1.act")
    assert said in own.reason
    assert result.report.kept["1.act"] == own.reason
    assert own.reason in str(result.plan)
    assert own.reason in str(result.report)
    assert said in "".join(result.report.notes)
    hooked: Any = result.model.get_submodule(f"1.{place}")
    held = (hooked._forward_hooks, hooked._forward_pre_hooks, hooked._backward_hooks, hooked._backward_pre_hooks)
    assert any(held) or "forward" in vars(hooked)
    for other in ("0.act", "2.act"):  # what is not hooked changes, and gives no reason
        assert other not in result.report.kept
        assert result.plan[other].form != "unchanged"


def test_without_a_hook_no_reason_is_given() -> None:
    result = compress(build(), flops=0.9)
    assert not any(site.reason for site in result.plan.sites)
    assert not result.report.kept
    assert "another reason" not in str(result.report)


def test_modules_with_hooks_inside_stay() -> None:
    """A block that one map could stand for is not taken with somebody's hook inside it."""
    torch.manual_seed(0)

    class Mixer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.a, self.b = nn.LayerNorm(8), nn.Linear(8, 32), nn.Linear(32, 8)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = x + 0.01 * self.b(self.a(self.norm(x)))
            return out

    model = nn.Sequential(Mixer(), nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8)).eval()
    data = [torch.randn(64, 8, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]
    taken = linearize.compress(model, data, flops=0.6, rounds=0, search=0, progress=False, cache=False)
    assert "whole module" in {site.form for site in taken.plan.sites}
    seen: list[int] = []
    hooked = copy.deepcopy(model)
    hooked.get_submodule("0.a").register_forward_hook(lambda *_: seen.append(1))
    result = linearize.compress(hooked, data, flops=0.6, rounds=0, search=0, progress=False, cache=False)
    assert "whole module" not in {site.form for site in result.plan.sites}
    assert "0.a has a hook" in "".join(result.report.notes)
    seen.clear()
    result.model(data[0])
    assert seen


def test_other_reasons() -> None:
    """Groups, a gate of squeeze-and-excite, a site whose options cost more: all have a reason."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.act, self.b = nn.Linear(8, 64), nn.GELU(), nn.Linear(64, 8)
            self.narrow, self.act2, self.wide = nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)
            self.gate, self.sigmoid = nn.Linear(8, 1), nn.Sigmoid()

        def forward(self, x: Tensor) -> Tensor:
            x = x + self.b(self.act(self.a(x)))
            h = self.act2(self.narrow(x))
            out: Tensor = (self.wide(h) + h.sum(-1, keepdim=True)) * self.sigmoid(self.gate(x))
            return out

    torch.manual_seed(0)
    data = [torch.randn(64, 8, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]
    result = linearize.compress(Net().eval(), data, flops=0.7, rounds=0, progress=False, cache=False)
    assert result.plan["act"].reason is None
    assert set(result.report.kept) == {"act2", "sigmoid"}
    assert all(result.report.kept.values())
    assert result.report.to_dict()["kept"] == result.report.kept


@pytest.mark.parametrize("budget", [{"flops": 0.7}, {"linear": 0.5}], ids=str)
def test_dry_runs_and_shares_say_it_too(budget: dict[str, Any]) -> None:
    model = build()
    model.get_submodule("1.project").register_forward_hook(lambda *_: None)
    options = {"flops": None, **budget, **({"dry_run": True} if "flops" in budget else {})}
    result = compress(model, **options)
    assert "a hook" in result.report.kept["1.act"]


def test_adapters_are_named() -> None:
    """A low-rank adapter that is not merged: the remedy is to merge it."""

    class Adapted(nn.Module):
        def __init__(self, base: nn.Linear) -> None:
            super().__init__()
            self.base_layer, self.a = base, nn.Linear(base.in_features, 2, bias=False)
            self.b = nn.Linear(2, base.out_features, bias=False)

        def merge(self) -> None: ...

        def unmerge(self) -> None: ...

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.base_layer(x) + self.b(self.a(x))
            return out

    model = nn.Sequential(Adapted(nn.Linear(4, 32)), nn.ReLU(), nn.Linear(32, 4))
    (site,) = linearize.summary(model, torch.randn(2, 4)).sites
    assert site.reason is not None
    assert "0 has an adapter beside its weight: merge it first" in site.reason
