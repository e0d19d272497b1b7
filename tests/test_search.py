"""The search for a plan: one run of the original, one copy for all trials, trials given up when they are behind."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

import linearize
from linearize.algebra.piece import Infeasible
from linearize.errors import CollapseError
from linearize.families.option import Option, SiteChoice
from linearize.families.price import Pricer
from linearize.gating.groups import groups_of
from linearize.planning.carry_out import carry_out_choices, edited, site_choices
from linearize.planning.knapsack import Choice
from linearize.planning.search import searched
from linearize.planning.survey import Survey
from linearize.planning.surveying import Wanted, survey
from linearize.running.copies import Workbench
from linearize.training.distance import Yardstick, real_loss

IMAGES = [torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(n)) for n in range(60)]


def surveyed() -> Survey:
    """Of a network in which channels, lines, blocks and modules have options."""
    torch.manual_seed(0)
    block = nn.Sequential(
        nn.Conv2d(3, 24, 1), nn.ReLU(), nn.Conv2d(24, 24, 3, padding=1, groups=24), nn.ReLU(), nn.Conv2d(24, 3, 1)
    )
    head = nn.Sequential(nn.Flatten(), nn.Linear(108, 32), nn.GELU(), nn.Linear(32, 4))
    model = nn.Sequential(block, head).eval()
    gated = linearize.convert(model, IMAGES[0])
    return survey(model, gated, IMAGES, IMAGES[0], Wanted("flops"), progress=False)


@pytest.fixture(scope="module")
def found() -> Survey:
    return surveyed()


def choice_of(options: list[Option]) -> Any:
    return site_choices(Choice(tuple(options), 0.0, 0.0, reachable=True))


def tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    return model.state_dict()


def test_a_copy_that_is_put_back_is_as_good_as_a_new_one(found: Survey) -> None:
    """Each option by itself: what it edits, replaces or freezes is gone afterwards."""
    bench = Workbench(found.gated, CollapseError)
    forms = set()
    with torch.no_grad():
        expected = found.gated(IMAGES[0])
        for option in [option for group in found.groups for option in group.options[1::3]]:
            choices = choice_of([option])
            forms |= {choice.form for choice in choices.values()}
            model = bench.fresh()
            assert torch.equal(model(IMAGES[0]), expected)
            carry_out_choices(found, model, choices)
            other = edited(found, choices)
            assert [type(part) for part in model.modules()] == [type(part) for part in other.modules()]
            assert tensors(model).keys() == tensors(other).keys()
            assert all(torch.equal(value, tensors(other)[name]) for name, value in tensors(model).items())
            assert not torch.equal(model(IMAGES[0]), expected)  # negative control
    assert any(family in str(forms) for family in ("block",))
    assert len(forms) >= 4, forms
    back = bench.fresh()
    assert all(torch.equal(value, tensors(found.gated)[name]) for name, value in tensors(back).items())


@pytest.mark.parametrize("memory", [1e9, 0.0])
def test_a_yardstick_measures_the_real_loss(found: Survey, memory: float) -> None:
    others = [edited(found, choice_of([group.options[-1]])) for group in found.groups[:2]]
    calls: list[int] = []
    handle = found.gated.register_forward_hook(lambda *_: calls.append(1))
    measure = Yardstick(found.gated, IMAGES, memory)
    once = len(calls)
    handle.remove()
    handle = found.gated.register_forward_hook(lambda *_: calls.append(1))
    losses = [measure.losses(other) for other in others]
    handle.remove()
    again = len(calls) - once
    assert (once, again) == ((len(IMAGES), 0) if memory else (1, 2 * len(IMAGES)))
    for other, loss in zip(others, losses, strict=True):
        assert sum(loss) == pytest.approx(real_loss(found.gated, other, IMAGES), rel=1e-9)


def test_a_candidate_that_is_far_behind_is_given_up(found: Survey) -> None:
    measure = Yardstick(found.gated, IMAGES)
    far = edited(found, choice_of([group.options[-1] for group in found.groups[:3]]))
    whole = measure.losses(far)
    assert measure.losses(far, best=whole) == whole
    calls: list[int] = []
    far.register_forward_hook(lambda *_: calls.append(1))
    short = measure.losses(far, best=[loss / 2 for loss in whole])
    assert len(calls) == 1
    assert short == [whole[0], math.inf]


def test_the_search_finds_the_plan_of_least_real_loss_among_its_trials(found: Survey) -> None:
    """Trials that are given up could not have won by their first batches; the winner is no worse than the start."""
    lines: list[str] = []
    budget = 0.6 * found.total - found.fixed
    searched(found, budget, IMAGES, trials=12, say=lines.append)
    told = [line.split()[1] for line in lines]
    numbers = [float(text) for text in told if text != "given"]
    assert numbers[0] >= min(numbers)
    assert len(lines) <= 12 + 1 + len(found.groups)
    worse = replace(found, groups=[replace(g, options=g.options[:1]) for g in found.groups])
    assert searched(worse, budget, IMAGES, trials=3).groups[0].options == worse.groups[0].options


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_convnext", "test_efficientnet"])
def test_a_price_that_is_remembered_is_that_of_the_layers_at_hand(name: str) -> None:
    """Layers of one shape share their prices, layers that differ in anything do not."""
    timm = pytest.importorskip("timm")
    model = timm.create_model(name).eval() if name != "test_convnext" else timm.create_model("test_convnext2").eval()
    gated = linearize.convert(model, torch.randn(1, 3, 64, 64))
    named, known = linearize.gates(gated), dict[Any, Any]()
    asked = 0
    for sites in groups_of(gated):
        pricer = Pricer(gated, [named[site] for site in sites], known)
        for share in (0.25, 0.5, 1.0):
            for form in ("factored", "merged", "narrowed"):
                choices = [SiteChoice(s, int(share * named[s].channels), form=form) for s in sites]
                asked += 1
                fresh = Pricer(gated, pricer.gates)
                assert told(lambda p=pricer, c=choices: p.costs(c)) == told(lambda p=fresh, c=choices: p.costs(c))
    assert 0 < len(known) <= asked
    assert len(known) < asked or name != "test_vit"  # whose layers are all alike


def told(price: Any) -> Any:
    """A price, or why there is none."""
    try:
        return price()
    except Infeasible as error:
        return str(error)
