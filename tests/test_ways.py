"""Code around an activation that does other things in another run: said, and not collapsed."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import linearize
from linearize.graph.fakes import fake_runs
from linearize.sites.record import record_of
from tests.chain import error, randomize


class Block(nn.Module):
    """A block whose hidden channels are doubled in some runs, behind the activation or before it."""

    def __init__(self, kind: str = "never", *, behind: bool = True, keyword: bool = False) -> None:
        super().__init__()
        self.keyword = keyword
        self.fc1, self.fc2, self.kind, self.behind, self.calls = nn.Linear(6, 8), nn.Linear(8, 6), kind, behind, 0
        self.drop = nn.Dropout(0.3)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        hidden: Tensor = self.fc1(x)
        if not self.behind and self.doubles(x):
            hidden = hidden * 2
        hidden = functional.gelu(hidden)
        if self.behind and self.doubles(x):
            hidden[..., :4] *= 2
        hidden = self.drop(hidden)
        return x + (self.fc2(input=hidden) if self.keyword else self.fc2(hidden))

    def doubles(self, x: Tensor) -> bool:
        kinds: dict[str, Any] = {
            "never": lambda: False,
            "training": lambda: self.training,
            "gradients": torch.is_grad_enabled,
            "every second call": lambda: self.calls % 2 == 0,
            "every fourth call": lambda: self.calls % 4 == 0,
            "a large batch": lambda: len(x) > 3,
            "python": lambda: random.random() < 0.1,  # noqa: S311 - not for secrets
            "numpy": lambda: np.random.rand() < 0.1,  # noqa: NPY002 - the generator that models draw from
        }
        return bool(kinds[self.kind]())


def runs(model: nn.Module) -> list[Tensor]:
    """What a model puts out in all kinds of runs."""
    found = []
    generator = torch.Generator().manual_seed(0)
    for training in (False, True):
        for gradients in (False, True):
            for batch in (2, 5):
                x = torch.randn(batch, 6, dtype=torch.float64, generator=generator)
                for call in range(4):
                    random.seed(call)
                    np.random.seed(call)  # noqa: NPY002
                    torch.manual_seed(call)
                    with torch.set_grad_enabled(gradients):
                        found.append(model.train(training)(x).detach())
    return found


def made(block: Block) -> tuple[nn.Module, nn.Module]:
    """A gated model with all channels linear, and the collapsed one."""
    torch.manual_seed(0)
    block.drop.p = 0.0
    net = nn.Sequential(block, nn.Linear(6, 3)).double()
    gated = linearize.convert(net, torch.randn(2, 6, dtype=torch.float64))
    randomize(gated, 1.0, seed=1)
    return gated, linearize.collapse(gated, when="always")


OTHER = {
    "training": "in training mode",
    "gradients": "with gradients",
    "every second call": "with gradients",
    "every fourth call": "at another call",
    "a large batch": "for a larger batch",
    "python": "Python's or NumPy's generator",
    "numpy": "Python's or NumPy's generator",
}


@pytest.mark.parametrize("behind", [True, False])
@pytest.mark.parametrize("kind", OTHER)
def test_what_does_other_things_in_another_run_is_left_alone(kind: str, behind: bool) -> None:
    gated, collapsed = made(Block(kind, behind=behind))
    assert error(runs(gated), runs(collapsed)) <= 1e-12
    record = record_of(gated)
    assert record is not None
    (site,) = record.sites
    assert site.reason is not None
    assert site.reason.startswith(("0.fc2", "0.gelu_0") if behind else "0.gelu_0")
    assert OTHER[kind] in site.reason or "every" in kind


def test_layers_that_are_given_their_input_by_keyword() -> None:
    gated, collapsed = made(Block("training", keyword=True))
    assert error(runs(gated), runs(collapsed)) <= 1e-12
    gated, collapsed = made(Block(keyword=True))
    assert error(runs(gated), runs(collapsed)) <= 1e-12
    assert isinstance(collapsed.get_submodule("0.fc2"), nn.Identity)


def test_a_block_that_always_does_the_same_is_collapsed() -> None:
    """Otherwise the tests above would show nothing."""
    gated, collapsed = made(Block())
    assert error(runs(gated), runs(collapsed)) <= 1e-12
    assert isinstance(collapsed.get_submodule("0.fc2"), nn.Identity)


def test_without_the_check_a_wrong_collapse_would_come_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("linearize.surgery.modes.seen_in_runs", lambda *_: None)
    gated, collapsed = made(Block("training", behind=False))
    assert error(runs(gated), runs(collapsed)) > 0.01


class Aside(nn.Module):
    """In training mode, something is read that nothing reads in eval mode."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.fc1, self.fc2, self.what = nn.Linear(6, 8), nn.Linear(8, 6), what
        self.kept: Tensor | None = None

    def forward(self, x: Tensor) -> Any:
        before = self.fc1(x)
        hidden = functional.gelu(before)
        out = self.fc2(hidden)
        if self.training:
            if self.what == "a penalty on what is hidden":
                return out, hidden.square().mean()
            if self.what == "a penalty on what is not yet activated":
                return out, before.square().mean()
            if self.what == "what is hidden comes out":
                return out, hidden
            if self.what == "what is hidden stays on the module":
                self.kept = hidden
            if self.what == "a penalty on what comes out":
                return out, out.square().mean()
        return out


ASIDE = {
    "a penalty on what is hidden": "gelu_0: in training mode its output is also read by pow",
    "a penalty on what is not yet activated": "fc1: in training mode its output is also read by pow",
    "what is hidden comes out": "gelu_0: in training mode its output is also read by the model's caller",
    "what is hidden stays on the module": "gelu_0: in training mode its output is also read by an attribute",
    "a penalty on what comes out": None,
}


@pytest.mark.parametrize("what", ASIDE)
def test_what_is_read_in_training_only(what: str) -> None:
    gated = linearize.convert(Aside(what), torch.randn(4, 6))
    record = record_of(gated)
    assert record is not None
    (site,), expected = record.sites, ASIDE[what]
    assert site.reason is None if expected is None else str(site.reason).startswith(expected)


class Writing(nn.Module):
    """Works in place on its input, and adds to a list that it is given."""

    def forward(self, x: Tensor, seen: list[Tensor]) -> tuple[Tensor, int]:
        seen.append(x)
        return x.mul_(2), len(seen)


def test_every_run_has_inputs_of_its_own() -> None:
    """What one run writes into its inputs is not there in the next one, nor in the user's own."""
    x, seen = torch.ones(2), list[Tensor]()
    with fake_runs(Writing(), ((x, seen), {}), real=True) as run:
        found = [run(), run()]
    assert [(out.tolist(), count) for out, count in found] == [([2.0, 2.0], 1)] * 2
    assert (x.tolist(), seen) == ([1.0, 1.0], [])


class Noisy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.norm = nn.Linear(6, 8), nn.Linear(8, 6), nn.BatchNorm1d(8)
        self.drop = nn.Dropout(0.3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.drop(functional.relu(self.norm(self.fc1(x))))
        if self.training:  # a mask for whole samples, as timm's drop_path
            hidden = hidden * hidden.new_empty(len(hidden), 1).bernoulli_(0.8).div_(0.8)
        return x + functional.dropout(self.fc2(hidden), 0.2, self.training)


def test_noise_of_training_is_no_other_way() -> None:
    gated = linearize.convert(Noisy(), torch.randn(4, 6))
    record = record_of(gated)
    assert record is not None
    assert [site.reason for site in record.sites] == [None]


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_models_without_values_are_seen_too(device: str) -> None:
    net = nn.Sequential(Block("training"), Block()).to(device)
    gated = linearize.convert(net, torch.randn(2, 6, device=device))
    record = record_of(gated)
    assert record is not None
    assert [site.reason is None for site in record.sites] == [False, True]


class NoisyLinear(nn.Linear):
    """A layer whose weights are noisy in training, as agents of reinforcement learning have it."""

    def forward(self, x: Tensor) -> Tensor:
        noise = torch.randn_like(self.weight) if self.training else 0.0
        return functional.linear(x, self.weight + 0.1 * noise, self.bias)


class DroppingLinear(nn.Linear):
    """A layer that drops inputs: a plain layer in its place would not."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(functional.dropout(x, 0.2, self.training), self.weight, self.bias)


class GradientLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y * 2 if torch.is_grad_enabled() else y


class OwnLinear(nn.Linear):
    """A layer of one's own that does the same in every run."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, 2 * self.weight, self.bias)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("kind", [NoisyLinear, DroppingLinear, GradientLinear, OwnLinear])
def test_layers_that_do_other_things_in_another_run(kind: type[nn.Linear], first: bool) -> None:
    torch.manual_seed(0)
    layers = [kind(6, 8), nn.GELU(), nn.Linear(8, 6)] if first else [nn.Linear(6, 8), nn.GELU(), kind(8, 6)]
    gated = linearize.convert(nn.Sequential(*layers).double(), torch.randn(3, 6, dtype=torch.float64))
    randomize(gated, 1.0, seed=1)
    collapsed = linearize.collapse(gated, when="always")
    assert error(runs(gated), runs(collapsed)) <= 1e-12
    record = record_of(gated)
    assert record is not None
    (site,) = record.sites
    place = 0 if first else 2
    reasons: dict[type[nn.Linear], str | None] = {
        NoisyLinear: f"{place}: in training mode it computes in another way",
        DroppingLinear: f"{place} also computes dropout",
        GradientLinear: f"{place}: with gradients it computes in another way",
        OwnLinear: None,
    }
    assert site.reason == reasons[kind]
