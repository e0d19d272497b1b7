"""Forwards that are rewritten, and what is left of the reading: nothing on the model, in globals, or among threads."""

from __future__ import annotations

import copy
import functools
import pickle
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - the usual name in user code
from torch import Tensor, fx, nn

import linearize
from linearize.errors import CaptureError, ConvertError
from linearize.graph import protect
from tests.chain import check_chain, randomize

X = torch.randn(3, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(6, 12), nn.Linear(12, 5)


class Slope(Base):
    slope = 0.1

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.leaky_relu(self.a(x), self.slope))


class Choice(Base):
    kind = "relu"

    def forward(this, x: Tensor) -> Tensor:  # noqa: N805 - not everybody says self
        return this.b(getattr(F, this.kind)(this.a(x)))


class Table(Base):
    def __init__(self) -> None:
        super().__init__()
        self.acts: list[Any] = [F.relu, F.gelu]

    def forward(self, x: Tensor) -> Tensor:
        act: Callable[[Tensor], Tensor] = self.acts[0]
        return self.b(act(self.a(x)))


class Private(Base):
    def __init__(self) -> None:
        super().__init__()
        self.__gain = 2.0

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.silu(self.a(x))) * self.__gain

    def louder(self) -> None:
        self.__gain += 1


class Held(Base):
    def __init__(self, act: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] != 6:
            raise ValueError("width")
        return self.b(self.act(self.a(x)))


class Repeated(Base):
    """One module with a parameter, called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.act, self.c = nn.PReLU(), nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.act(self.c(self.act(self.a(x)))))


CHANGES: dict[type[Base], Callable[[Any], Any]] = {
    Slope: lambda m: setattr(m, "slope", 0.7),
    Choice: lambda m: setattr(m, "kind", "tanh"),
    Table: lambda m: m.acts.reverse(),
    Private: lambda m: m.louder(),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_what_changes_later_counts(kind: type[Base], tmp_path: Path) -> None:
    model = kind().double().eval()
    gated, collapsed = check_chain(model, X)
    fresh = linearize.convert(model, X)
    linearize.save(collapsed, tmp_path / "m.safetensors")
    loaded = linearize.load(tmp_path / "m.safetensors", model=kind().double())
    before = model(X)
    for one in (model, fresh, gated, collapsed, loaded):
        CHANGES[kind](one)
    assert not torch.equal(before, model(X)), "negative control"
    assert torch.equal(model(X), fresh(X))
    assert torch.allclose(collapsed(X), loaded(X), rtol=1e-12, atol=0)
    assert torch.equal(copy.deepcopy(fresh)(X), model(X))
    assert torch.equal(pickle.loads(pickle.dumps(fresh))(X), model(X))  # noqa: S301 - our own bytes


def test_a_slope_that_changes_between_forward_and_backward() -> None:
    model = Slope().double()
    gated = linearize.convert(model, X)
    for one in (model, gated):
        first = one(X)
        setattr(one, "slope", 0.9)  # noqa: B010 - modules are typed
        (first.square().mean() + one(X).square().mean()).backward()
    assert torch.allclose(gated.a.weight.grad, model.a.weight.grad, rtol=1e-12, atol=1e-15)  # type: ignore[union-attr, arg-type]


class Doubled:
    def __call__(self, x: Tensor) -> Tensor:
        return F.relu(2 * x)


HELD: dict[str, Callable[[Tensor], Tensor]] = {
    "function": F.gelu,
    "builtin": torch.tanh,
    "partial": functools.partial(F.leaky_relu, negative_slope=0.2),
    "lambda": lambda x: x * torch.sigmoid(1.7 * x),
    "object": Doubled(),
}


@pytest.mark.parametrize("name", HELD)
def test_functions_in_attributes(name: str, tmp_path: Path) -> None:
    model = Held(HELD[name]).double().eval()
    gated, collapsed = check_chain(model, X)
    assert set(linearize.gates(gated)) == {"act"}
    assert model.act is HELD[name]
    linearize.save(collapsed, tmp_path / "m.safetensors")
    loaded = linearize.load(tmp_path / "m.safetensors", model=Held(HELD[name]).double())
    assert torch.allclose(loaded(X), collapsed(X), rtol=1e-12, atol=1e-14)
    with pytest.raises(ValueError, match="width"):
        gated(X[:, :5])


def test_a_parameter_that_is_used_twice_is_one() -> None:
    model = Repeated().double()
    gated = linearize.convert(model, X)
    assert len(linearize.gates(gated)) == 2
    for one in (model, gated):
        one.train()
        optimizer = torch.optim.SGD([p for n, p in one.named_parameters() if "alpha" not in n], 0.1)
        for _ in range(3):
            optimizer.zero_grad()
            one(X).square().mean().backward()
            optimizer.step()
    assert torch.allclose(model(X), gated(X), rtol=1e-12, atol=1e-14)


def test_a_graph_module_is_rewritten_itself(tmp_path: Path) -> None:
    model = fx.symbolic_trace(Repeated().double().eval())
    functional = fx.symbolic_trace(Private().double().eval())
    for traced, count in ((model, 2), (functional, 1)):
        code = traced.code
        gated = linearize.convert(traced, X)
        assert isinstance(gated, fx.GraphModule)
        assert torch.equal(gated(X), traced(X))
        assert len(linearize.gates(gated)) == count
        assert traced.code == code
        randomize(gated, 0.5)
        assert torch.equal(copy.deepcopy(gated)(X), gated(X))
        assert not torch.allclose(gated(X), traced(X))
        collapsed = linearize.collapse(gated, when="always")
        assert torch.allclose(gated(X), collapsed(X), rtol=1e-12, atol=1e-13)
        linearize.save(collapsed, tmp_path / "m.safetensors")
        loaded = linearize.load(tmp_path / "m.safetensors", model=copy.deepcopy(traced))
        assert torch.allclose(loaded(X), collapsed(X), rtol=1e-12, atol=1e-14)


def without_source(code: str) -> nn.Module:
    space: dict[str, Any] = {}
    exec("import torch, torch.nn as nn, torch.nn.functional as F\nGAIN = 2.0\n" + code, space)  # noqa: S102
    torch.manual_seed(0)
    model: nn.Module = space["Net"]()
    return model.double().eval()


HEAD = """
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.gain, self.log = nn.Linear(6, 12), nn.Linear(12, 5), 2.0, []
        self.drop = nn.Dropout(0.3)
    def forward(self, x):
        h = F.relu(self.a(x))
"""
STATE = {
    "reads self.gain": "h = h * self.gain",
    "writes to": "self.last = h",
    "reads self.log": "self.log.append(h)",
    "reads p of a child": "h = F.dropout(h, self.drop.p, self.training)",
    "reads the global GAIN": "h = h * GAIN",
    "calls torch.randn": "h = h + torch.randn(12)",
    "calls torch.is_grad_enabled": "h = h if torch.is_grad_enabled() else 2 * h",
    "hands self on": "me = self; h = h * me.gain",
}


@pytest.mark.parametrize("reason", STATE)
def test_no_graph_for_what_can_change(reason: str) -> None:
    model = without_source(f"{HEAD}        {STATE[reason]}\n        return self.b(h)\n")
    with pytest.raises(ConvertError, match=reason):
        linearize.convert(model, X)


def test_a_graph_where_nothing_can_change() -> None:
    model = without_source(f"{HEAD}        h = self.drop(h) * 3\n        return self.b(h.view(h.shape))\n")
    check_chain(model, X)


class Remembering(Base):
    """It leaves something in a list, in a dict of lists, on an object, on the class, and in a global."""

    latest: Any = None

    def __init__(self) -> None:
        super().__init__()
        self.log: list[Any] = []
        self.nested: dict[str, list[Any]] = {"all": []}
        self.cell = Doubled()

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.a(x))
        self.log.append(h)
        self.nested["all"].append(h)
        self.cell.last = h  # type: ignore[attr-defined]
        Remembering.latest = h
        SEEN.append(h)
        return self.b(h)


SEEN: list[Any] = []


def test_nothing_is_left_of_the_reading() -> None:
    model = Remembering().double().eval()
    SEEN[:] = ["mine"]
    gated: Any = linearize.convert(model, X)
    for one in (model, gated):
        assert one.log == []
        assert one.nested == {"all": []}
        assert not hasattr(one.cell, "last")
    assert SEEN == ["mine"]
    assert Remembering.latest is None
    gated(X)
    assert [type(value) for value in (*gated.log, *gated.nested["all"], gated.cell.last, *SEEN[1:])] == [Tensor] * 4


class Lazy:
    """A library that is imported when it is touched, and is not installed."""

    def __getattribute__(self, name: str) -> Any:
        raise ImportError("this library is not installed")


def test_lazy_objects_are_not_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    file = ModuleType("some_library")
    exec("from torch import nn\nclass Net(nn.Sequential):\n    pass", vars(file))  # noqa: S102
    vars(file).update(lazy=Lazy())
    monkeypatch.setitem(sys.modules, "some_library", file)
    model = vars(file)["Net"](nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2)).double()
    linearize.convert(model, X, inplace=True)
    assert len(linearize.gates(model)) == 1


def test_a_failure_of_our_own_is_not_put_on_the_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_memories: Any) -> None:
        raise RuntimeError("broken watch")

    monkeypatch.setattr(protect, "_forget_tensors", broken)
    from linearize.graph.capture import capture

    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU())
    with pytest.raises(CaptureError, match=r"runs by itself, but not where linearize watches it.*broken watch"):
        capture(model, ((torch.randn(2, 6),), {}))
    with pytest.raises(CaptureError, match="does not run on the example inputs"):
        capture(model, ((torch.randn(2, 5),), {}))


class Unit(nn.Module):
    """One activation for all, and a forward that is put on the object, as fused units of detectors have it."""

    shared = nn.SiLU()

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv, self.act = nn.Conv2d(3, width, 1), self.shared
        self.last = nn.Conv2d(width, 3, 1)
        self.forward = self.fused

    def fused(self, x: Tensor) -> Tensor:
        return self.last(self.act(self.conv(x)))


def test_paths_told_from_their_caller() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Unit(8), Unit(12)).double().eval()
    gated, _ = check_chain(model, torch.randn(2, 3, 5, 5, dtype=torch.float64))
    assert [(name, gate.channels) for name, gate in linearize.gates(gated).items()] == [("0.act", 8), ("1.act", 12)]


class Weighted(Base):
    def __init__(self) -> None:
        super().__init__()
        self.act, self.w = nn.ReLU(), nn.Parameter(torch.rand(1))

    def forward(self, x: Tensor) -> Tensor:
        return F.prelu(x.mT, self.w).mT.sum() + self.b(self.act(self.a(x)))


def test_the_record_is_plain(tmp_path: Path) -> None:
    gated = linearize.convert(Weighted().double().eval(), X)
    randomize(gated, 0.5)
    assert {row.name: row.reason for row in linearize.summary(gated).sites}["prelu_0"]
    for made in (linearize.collapse(gated), copy.deepcopy(gated)):
        pickle.dumps(made)
        linearize.save(made, tmp_path / "m.safetensors")


def small() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2)).double()


def test_threads_wait_for_each_other() -> None:
    found: list[str] = []

    def work() -> None:
        try:
            found.append("ok" if linearize.gates(linearize.convert(small(), X)) else "no gates")
        except Exception as error:  # to be seen below
            found.append(repr(error))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == ["ok"] * 8


def test_under_a_default_device_of_meta() -> None:
    model = small()
    with torch.device("meta"):
        gated = linearize.convert(model, X)
        assert torch.get_default_device().type == "meta"
    assert all(tensor.device.type == "cpu" for tensor in gated.state_dict().values())
    assert torch.equal(gated(X), model(X))


def test_under_inference_mode() -> None:
    with torch.inference_mode():
        gated = linearize.convert(small(), torch.randn(3, 6, dtype=torch.float64))
        kept = small()
        with pytest.raises(ConvertError, match="inference_mode"):
            linearize.convert(kept, X, inplace=True)
    assert not any(tensor.is_inference() for tensor in (*gated.parameters(), *gated.buffers()))
    gated(X).sum().backward()
    assert linearize.gates(gated)["1"].alpha.grad is not None


class Penalised(nn.Module):
    """An activation that counts, and draws noise in training mode."""

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.last = 0, torch.zeros(())

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(x)
        self.last, self.calls = y, self.calls + 1
        return y + torch.rand_like(y) if self.training else y


def test_an_activation_that_leaves_something_runs_once() -> None:
    model = nn.Sequential(nn.Linear(6, 8), Penalised(), nn.Linear(8, 2)).double()
    gated = linearize.convert(model, X)
    found = []
    for one, act in ((model, model[1]), (gated, linearize.gates(gated)["1"].activation)):
        one.train()
        torch.manual_seed(0)
        (one(X).square().mean() + act.last.mean()).backward()  # type: ignore[operator]
        assert act.calls == 1
        found.append(one[0].weight.grad)  # type: ignore[index]
    assert torch.allclose(found[0], found[1], rtol=1e-12, atol=1e-15)


class OnlyAnActivation(nn.Module):
    """As transformers' `GELUActivation`: a module that is nothing but the function that it holds."""

    def __init__(self) -> None:
        super().__init__()
        self.act = torch.nn.functional.gelu

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(x)


def test_a_module_that_is_nothing_but_its_function_is_one_site_under_its_own_name() -> None:
    model = nn.Sequential(nn.Linear(4, 8), OnlyAnActivation(), nn.Linear(8, 2))
    gated = linearize.convert(model, torch.randn(3, 4))
    assert list(linearize.gates(gated)) == ["1"]
    assert isinstance(gated.get_submodule("1"), linearize.ChannelGate)
