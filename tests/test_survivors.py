"""What no other test noticed when a fault was put in (benchmarks/stress/mutants.py)."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import linearize
from linearize.algebra.affine import Affine, apply, compose, obstacle
from linearize.algebra.forms import FORMS
from linearize.algebra.piece import Infeasible, Maps
from linearize.cost import Cost
from linearize.errors import CheckpointError
from linearize.families.family import Context
from linearize.families.option import Group, Option
from linearize.plan import Plan
from linearize.planning import settle as settling
from linearize.planning.budget import Budget
from linearize.planning.knapsack import Choice
from linearize.planning.settle import Settled
from linearize.planning.survey import Survey
from linearize.storage.tensorfile import read_header
from tests.chain import TOLERANCE, check_chain, error, outputs


@pytest.mark.parametrize("size", [(7, 7), (8, 5), (9, 10)])
@pytest.mark.parametrize("stride", [1, 2])
def test_a_pointwise_map_behind_one_whose_padding_depends_on_the_size(size: tuple[int, int], stride: int) -> None:
    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=torch.float64)

    inner = Affine(noise(5, 3, 3, 3), noise(5), (stride, stride), (0, 0), (1, 1), same=True)
    outer = Affine(noise(4, 5, 1, 1), noise(4), (1, 1), (0, 0), (1, 1))
    assert obstacle(outer, inner) is None
    both = compose(outer, inner)
    x = noise(2, 3, *size)
    expected = apply(outer, apply(inner, x))
    assert both.same
    assert apply(both, x).shape == expected.shape == (2, 4, -(-size[0] // stride), -(-size[1] // stride))
    torch.testing.assert_close(apply(both, x), expected, rtol=0, atol=1e-12 * float(expected.abs().max()))


def lively(model: nn.Module) -> nn.Module:
    """In float64 and eval mode, with norms that do something."""
    torch.manual_seed(3)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.bias, module.running_mean, module.running_var):
                nn.init.uniform_(tensor, 0.5, 1.5)  # type: ignore[arg-type]
    return model.double().eval()


class Between(nn.Module):
    """Something between producer and activation; what the producer puts out may be read elsewhere, too."""

    def __init__(self, between: nn.Module, *, read_twice: bool = False) -> None:
        super().__init__()
        self.first, self.between, self.act = nn.Conv2d(3, 16, 1), between, nn.ReLU()
        self.last, self.read_twice = nn.Conv2d(16, 16, 1), read_twice

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        y = self.last(self.act(self.between(x)))
        return y + x if self.read_twice else y


IMAGE = torch.randn(2, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_two_constant_maps_before_the_activation_fold_in_their_order() -> None:
    model = lively(Between(nn.Sequential(nn.BatchNorm2d(16), nn.BatchNorm2d(16))))
    gated, collapsed = check_chain(model, IMAGE)
    assert linearize.gates(gated)["act"].site.reason is None  # type: ignore[union-attr]
    assert collapsed.first.out_channels != 16  # type: ignore[union-attr]


def test_a_producer_that_is_read_in_two_places_keeps_its_channels() -> None:
    """The second reader sees it before the norm that would be folded into it."""
    gated, _ = check_chain(lively(Between(nn.BatchNorm2d(16), read_twice=True)), IMAGE)
    reason = linearize.gates(gated)["act"].site.reason  # type: ignore[union-attr]
    assert reason is not None
    assert "also read elsewhere" in reason


@pytest.mark.parametrize("between", [nn.ZeroPad2d(1), nn.AvgPool2d(3, stride=1, padding=1)])
def test_what_pads_before_the_activation_keeps_the_channels(between: nn.Module) -> None:
    """At the border the producer's bias is missing."""
    gated, _ = check_chain(lively(Between(between)), IMAGE)
    reason = linearize.gates(gated)["act"].site.reason  # type: ignore[union-attr]
    assert reason is not None
    assert "scales or pads" in reason


def test_a_constant_that_is_padded_afterwards_does_not_leave_its_chain() -> None:
    """Zeros at the border dilute it, so that no bias of the consumer's can stand for it."""
    model = lively(
        nn.Sequential(
            nn.Conv2d(3, 8, 1),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3, groups=8),
            nn.ReLU(),
            nn.AvgPool2d(3, stride=1, padding=1),
            nn.Conv2d(8, 4, 1),
        )
    )
    gated = linearize.convert(model, IMAGE)
    gate = linearize.gates(gated)["3"]
    gate.slope.zero_()
    gate.intercept.fill_(0.7)
    gate.intercept[:2] = 0.0  # these may leave
    gate.linearize_(torch.arange(8) < 6)
    collapsed = linearize.collapse(gated, when="always")
    assert error(outputs(gated, IMAGE), outputs(collapsed, IMAGE)) <= TOLERANCE[torch.float64]


def _forged(path: Path, entry: dict[str, Any], data: int) -> Path:
    header = json.dumps({"a": entry}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(data))
    return path


def test_a_header_that_gives_a_tensor_more_than_its_shape_takes(tmp_path: Path) -> None:
    fits = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}
    assert read_header(_forged(tmp_path / "good", fits, 24)).shapes == {"a": (2, 3)}
    for end in (20, 28):
        with pytest.raises(CheckpointError, match="size of 'a' is not that of its shape"):
            read_header(_forged(tmp_path / "bad", {**fits, "data_offsets": [0, end]}, end))


def test_a_file_that_lacks_the_end_of_its_last_tensor(tmp_path: Path) -> None:
    entry = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}
    with pytest.raises(CheckpointError, match="24 bytes, 23 are there"):
        read_header(_forged(tmp_path / "short", entry, 23))


@pytest.mark.parametrize("slowest", [1.3, 0.9])
def test_a_plan_that_is_slower_than_the_original_is_not_given_out(
    slowest: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where every change misses the budget and makes the model slower, the original is the nearest."""
    options = tuple(Option((), loss, cost, 0, 0, latency=cost) for loss, cost in ((0.0, 1.0), (1.0, 0.5)))
    context = Context(nn.Identity(), None, [], "latency")
    found = Survey(context, "latency", [Group(("a",), options)], 1.0, Cost(1, 1))

    def measured(_: Any, budget: Budget, choice: Choice, *__: Any) -> Settled:
        reached = 1.0 if choice.cost == 1.0 else slowest
        return Settled(choice, nn.Identity(), nn.Identity(), Plan(()), choice.cost, reached, reached <= budget.fraction)

    monkeypatch.setattr(settling, "_try", measured)
    settled = settling.settle(found, Budget("latency", 0.6), None, gauges={"latency": lambda _: 1.0})
    assert not settled.met
    assert settled.choice.cost == (1.0 if slowest > 1 else 0.5)
    assert settled.reached == min(slowest, 1.0)


@pytest.mark.parametrize("between", [nn.AvgPool2d(2), nn.Upsample(scale_factor=2, mode="nearest")])
def test_a_padded_map_behind_something_steady_takes_the_whole_site_in(between: nn.Module) -> None:
    """Its bias at the border is exact, whatever moves positions in between."""
    model = lively(nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), between, nn.Conv2d(8, 4, 3, padding=1)))
    _, collapsed = check_chain(model, IMAGE, share=1.0)
    assert isinstance(collapsed[0], nn.Identity)  # type: ignore[index]


def test_grouped_channels_are_not_put_into_another_order() -> None:
    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64)

    half = torch.arange(3)
    maps = Maps(
        producer=Affine(noise(6, 4), noise(6)),
        consumers=(Affine(noise(5, 6), noise(5)),),
        producer_at=("producer", 0),
        consumers_at=(("consumer", 0),),
        slope=noise(6),
        intercept=noise(6),
        keep=half,
        linear=half + 3,
        dropped=half[:0],
    )
    assert set(FORMS["factored"](maps)) == {"producer", "consumer"}
    with pytest.raises(Infeasible, match="grouped"):
        FORMS["factored"](replace(maps, grouped=True))


class Unfolded(nn.Module):
    """A single channel behind a view that adds an axis of one: which axis it is on, only other sizes tell."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.act, self.last = nn.Linear(3, 1), nn.Hardswish(), nn.Linear(1, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x.reshape(-1, 3)).view(*x.shape[:-1], 1)
        return self.last(self.act(y))


def test_a_single_channel_behind_a_view_is_on_no_axis_that_is_guessed() -> None:
    model = Unfolded().double().eval()
    x = torch.randn(2, 1, 3, dtype=torch.float64)
    try:
        gated = linearize.convert(model, x)
    except linearize.LinearizeError:
        return
    longer = torch.randn(2, 5, 3, dtype=torch.float64)
    gated(longer).sum().backward()
    assert all(gate.axis == -1 for gate in linearize.gates(gated).values())


class Overlapping(nn.Module):
    """A packed gated unit whose halves are cut at places that do not follow the width."""

    def __init__(self) -> None:
        super().__init__()
        self.both, self.act, self.down = nn.Linear(4, 6), nn.SiLU(), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.both(x)
        return self.down(self.act(h[..., :3]) * h[..., -3:])


class Broadcasting(Overlapping):
    """The same from the start: of a narrower tensor, the second half may be one channel, which is broadcast."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.both(x)
        return self.down(self.act(h[..., :3]) * h[..., 3:])


@pytest.mark.parametrize("kind", [Overlapping, Broadcasting])
@pytest.mark.parametrize("linear", [1, 2, 3])
def test_halves_that_are_cut_at_fixed_places_keep_their_width(kind: type[nn.Module], linear: int) -> None:
    torch.manual_seed(4)
    model = kind().double().eval()
    x = torch.randn(5, 4, dtype=torch.float64)
    gated = linearize.convert(model, x)
    gate = linearize.gates(gated)["act"]
    gate.slope.zero_()
    gate.intercept.copy_(torch.tensor([0.5, -1.0, 2.0]))
    gate.linearize_(torch.arange(3) < linear)
    small = linearize.collapse(gated, when="always")
    assert error(outputs(gated, x), outputs(small, x)) <= TOLERANCE[torch.float64]
