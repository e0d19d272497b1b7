"""Heads of attention: found by what the graph does, removed exactly, refitted, chosen, saved, and generated with."""

from __future__ import annotations

import copy
import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import linearize
from linearize.cost import cost
from linearize.errors import CheckpointError, UsageError
from linearize.families.heads.apply import record_steps, slice_heads, without_heads
from linearize.families.heads.collect import HeadsCollector
from linearize.families.heads.family import AttentionHeads, HeadPlaces, _outputs
from linearize.families.heads.find import heads_of
from linearize.families.heads.fit import curve_of
from linearize.families.heads.options import HEADS, heads_group
from linearize.families.heads.place import Heads
from linearize.families.option import SiteChoice
from linearize.plan import Plan, SitePlan
from linearize.running.passes import run_passes
from linearize.surgery.attributes import set_attributes
from linearize.training.distance import real_loss
from linearize.training.probes import projection
from tests.attentions import LAYOUTS, cache_bytes, cache_of, generated, llama, logits, tokens
from tests.chain import off
from tests.toys import QUIET


def observed(model: nn.Module, batches: list[Any]) -> list[Heads]:
    """The places of a model, with statistics."""
    places, reasons = heads_of(model, batches[0])
    assert not reasons
    collectors = [HeadsCollector(place, _outputs(model, place)) for place in places]
    run_passes(model, batches, collectors, probe=projection, progress=False)
    return places


@functools.cache
def prepared(layout: str) -> tuple[nn.Module, list[Heads]]:
    """A gated model of a layout, and its attentions."""
    make, data = LAYOUTS[layout]
    gated = linearize.convert(make(), data())
    places, reasons = heads_of(gated, data())
    assert places
    assert not reasons
    return gated, places


def removed(layout: str, gone: tuple[int, ...]) -> tuple[nn.Module, nn.Module]:
    """A model with units zeroed in every attention, and the same sliced."""
    gated, places = copy.deepcopy(prepared(layout)[0]), prepared(layout)[1]
    for place in places:
        without_heads(gated, place, gone)
    small = copy.deepcopy(gated)
    for place in places:
        record_steps(small, slice_heads(small, place, gone))
    return gated, small


# What is found


@pytest.mark.slow
def test_heads_are_found_in_every_layout() -> None:
    found = {layout: [place.attention for place in prepared(layout)[1]] for layout in LAYOUTS}
    assert all(len(some) == 2 and not any(one.reason for one in some) for some in found.values())
    units = {name: some[0].units for name, some in found.items()}
    assert units["grouped"] == units["grouped, eager"] == ((0, 1), (2, 3), (4, 5), (6, 7))
    assert units["one group"] == units["each its own"] == tuple((head,) for head in range(8))
    packed = {name: found[name][0].rows[0].by_head[1] for name in found if name.startswith("packed")}
    assert packed["packed, transposed"] == tuple(p * 32 + 8 + d for p in range(3) for d in range(8))
    assert packed["packed, interleaved"] == tuple(range(24, 48))
    assert packed["packed, images"] == tuple(p * 48 + 12 + d for p in range(3) for d in range(12))
    shared = {rows.port.module.rpartition(".")[2]: rows.shared for rows in found["one group"][0].rows}
    assert shared == {"q_proj": False, "k_proj": True, "v_proj": True}


class Own(nn.Module):
    """Attention as a user may write it: a softmax of products, and views that name no number."""

    def __init__(self, heads: int = 3, width: int = 4, *, twist: str = "") -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(8, heads * width) for _ in range(3))
        self.o, self.width, self.twist = nn.Linear(heads * width, 8), width, twist
        self.table = nn.Parameter(torch.randn(heads, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (m(x).unflatten(-1, (-1, self.width)).transpose(1, 2) for m in (self.q, self.k, self.v))
        if self.twist == "mixed":
            q, k = (functional.layer_norm(t, t.shape[1:]) for t in (q, k))
        scores = (q @ k.transpose(-2, -1)) * self.width**-0.5
        scores = scores + self.table * torch.arange(x.shape[1]) if self.twist == "table" else scores
        h = scores.softmax(-1) @ (v.relu() if self.twist == "bent" else v)
        out: Tensor = self.o(h.transpose(1, 2).flatten(2)) + (0.1 * v.sum() if self.twist == "read" else 0)
        return out


def test_attention_of_ones_own_and_why_it_stays() -> None:
    x = torch.randn(2, 5, 8)

    def found(twist: str) -> tuple[list[Heads], dict[str, str]]:
        model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), Own(twist=twist)).eval()
        return heads_of(linearize.convert(model, x), x)

    places, reasons = found("")
    assert [place.attention.owner for place in places] == ["3"]
    assert not reasons
    assert "mixed" in found("mixed")[1]["3"]
    assert "takes no other number of heads" in found("table")[1]["3"]  # a parameter for each head
    assert "done to its values" in found("bent")[1]["3"]
    assert "also reads them" in found("read")[1]["3"]
    hooked = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), Own()).eval()
    hooked[3].get_submodule("o").register_forward_hook(lambda *_: None)
    assert heads_of(linearize.convert(hooked, x), x)[0] == []


@pytest.mark.slow
def test_reasons_are_told_for_libraries_models(recwarn: pytest.WarningsRecorder) -> None:
    import timm

    swin = timm.create_model("swin_tiny_patch4_window7_224", img_size=56, embed_dim=16, depths=(1, 1), num_heads=(2, 4))
    x = torch.randn(1, 3, 56, 56)
    places, reasons = heads_of(linearize.convert(swin.eval(), x), x)
    assert not places
    assert all("takes no other number of heads" in why for why in reasons.values())
    model = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True).eval()
    places, reasons = heads_of(linearize.convert(model, torch.randn(2, 5, 16)), torch.randn(2, 5, 16))
    assert not places  # its packed weight belongs to no layer


# What is exact


@pytest.mark.parametrize("layout", LAYOUTS)
def test_slicing_is_exact(layout: str) -> None:
    make, data = LAYOUTS[layout]
    model = make()
    gated, small = removed(layout, (0, 2))
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
        batch = data() if isinstance(data(), dict) else data().to(dtype)
        before, zeroed, sliced = (logits(m.to(dtype), batch) for m in (model, gated, small))
        assert off(sliced, zeroed) <= tolerance
        assert off(before, zeroed) > 1e-2  # negative control: the heads did something
        assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in gated.parameters())


def test_other_heads_are_another_function() -> None:
    """Negative control: slicing away heads that were not zeroed changes what comes out."""
    (gated, _), places = removed("grouped", (0, 2)), prepared("grouped")[1]
    wrong = copy.deepcopy(gated)
    for place in places:
        slice_heads(wrong, place, (1, 2))
    assert float((logits(wrong, tokens()) - logits(gated, tokens())).abs().max()) > 1e-2


@pytest.mark.parametrize("layout", ["grouped", "grouped, eager", "one group"])
def test_generation_and_its_cache(layout: str) -> None:
    gated, small = removed(layout, (1,))
    ways: list[dict[str, Any]] = [{}, {"cache": "static"}, {"beams": 3}]
    for options in ways:
        assert torch.equal(generated(small, **options), generated(gated, **options))
    left = 1.0 if layout == "one group" else 3 / 4  # one group of keys and values stays whole
    assert cache_bytes(cache_of(small, tokens())) == left * cache_bytes(cache_of(gated, tokens()))
    assert not torch.equal(generated(prepared(layout)[0]), generated(gated))


def test_generation_with_packed_maps() -> None:
    for layout in ("packed, transposed", "packed, interleaved"):
        gated, small = removed(layout, (1,))
        assert torch.equal(generated(small), generated(gated))
        assert cache_bytes(cache_of(small, tokens())) == 3 / 4 * cache_bytes(cache_of(gated, tokens()))


@pytest.mark.parametrize("layout", ["grouped", "packed, transposed", "packed, images"])
def test_saved_and_loaded(layout: str, tmp_path: Path) -> None:
    gated, small = removed(layout, (1,))
    batch = LAYOUTS[layout][1]()
    for path, model in (("gated", gated), ("small", linearize.collapse(small))):
        linearize.save(model, tmp_path / path)
        again = linearize.load(tmp_path / path)
        assert all(
            torch.equal(a, b) for a, b in zip(again.state_dict().values(), model.state_dict().values(), strict=True)
        )
        assert off(logits(again, batch), logits(model, batch)) <= 1e-5
    assert float((logits(small, batch) - logits(prepared(layout)[0], batch)).abs().max()) > 1e-3


def test_a_model_of_ones_own_is_saved_with_its_numbers(tmp_path: Path) -> None:
    class Counting(Own):
        def __init__(self) -> None:
            super().__init__()
            self.heads, self.shape = 3, (3, 4)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (m(x).unflatten(-1, self.shape).transpose(1, 2) for m in (self.q, self.k, self.v))
            h = functional.scaled_dot_product_attention(q, k, v)
            out: Tensor = self.o(h.transpose(1, 2).reshape(*x.shape[:-1], self.heads * 4))
            return out

    def make() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), Counting()).eval()

    x = torch.randn(2, 5, 8)
    gated = linearize.convert(make(), x)
    (place,), _ = heads_of(gated, x)
    assert place.attributes == {("3", "heads"): ("heads",), ("3", "shape.0"): ("heads",)}
    without_heads(gated, place, (1,))
    expected = logits(gated, x)
    record_steps(gated, slice_heads(gated, place, (1,)))
    assert (gated[3].heads, gated[3].shape) == (2, (2, 4))  # type: ignore[index]
    small = linearize.collapse(gated)
    torch.testing.assert_close(logits(small, x), expected)
    linearize.save(small, tmp_path / "m")
    assert off(logits(linearize.load(tmp_path / "m", model=make()), x), expected) <= 1e-5
    with pytest.raises(CheckpointError, match="no number 'weight'"):
        set_attributes(small, {"weight": 3})


# What it costs and loses


@pytest.mark.parametrize("layout", ["grouped", "one group", "packed, transposed", "packed, images"])
@pytest.mark.slow
def test_costs_are_exact(layout: str) -> None:
    make, data = LAYOUTS[layout]
    batch, model = data(), make()
    gated = linearize.convert(model, batch)
    place = observed(gated, [batch])[1]
    group = heads_group(gated, curve_of(gated, place))
    before = cost(model, batch)
    for option in group.options[1::3]:
        small = copy.deepcopy(gated)
        slice_heads(small, place, option.choices[0].gone)
        after = cost(linearize.collapse(small), batch)
        assert before.parameters - after.parameters == group.stay.params - option.params
        assert before.flops - after.flops == group.stay.flops - option.flops
    if place.cached:
        assert 2 * group.stay.cache == cache_bytes(cache_of(model, batch))
    assert bool(place.cached) == (layout in ("grouped", "one group", "packed, transposed"))


@pytest.mark.slow
def test_the_predicted_loss_is_about_the_measured_one_and_refitting_helps() -> None:
    model, batches = llama(layers=2), [tokens(16, 12, seed) for seed in range(12)]
    gated = linearize.convert(model, batches[0])
    place = observed(gated, batches)[1]
    curve = curve_of(gated, place)
    found: dict[str, float] = {}
    gone = curve.gone(3)
    for name, fit in (("refitted", curve.refitted(gone)), ("zeroed", None)):
        edited = copy.deepcopy(gated)
        without_heads(edited, place, gone, fit)
        found[name] = real_loss(gated, edited, batches)
    assert found["refitted"] < found["zeroed"]
    assert 0.3 < curve.loss(3) / found["refitted"] < 3
    others = [real_loss(gated, edited_without(gated, place, (unit,)), batches) for unit in range(4)]
    assert others[gone[0]] == min(others)  # the unit that goes first is the one that costs least


def edited_without(gated: nn.Module, place: Heads, gone: tuple[int, ...]) -> nn.Module:
    edited = copy.deepcopy(gated)
    without_heads(edited, place, gone, curve_of(gated, place).refitted(gone))
    return edited


def test_parts_of_the_data_merge_to_the_whole() -> None:
    batches = [{**tokens(4, 9, seed), "attention_mask": torch.ones(4, 9, dtype=torch.long)} for seed in range(4)]
    for batch in batches:
        batch["attention_mask"][0, :3] = 0
    gated = linearize.convert(llama(layers=1), batches[0])
    (place,), _ = heads_of(gated, batches[0])
    whole, first, second = (HeadsCollector(copy.deepcopy(place), 32) for _ in range(3))
    for collector, some in ((whole, range(4)), (first, range(2)), (second, range(2, 4))):
        run_passes(gated, [batches[i] for i in some], [collector], probe=projection, indices=some, progress=False)
    first.merge(second)
    assert whole.place.rows is not None
    assert first.place.rows is not None
    assert whole.place.rows.count == first.place.rows.count == 4 * (4 * 9 - 3)
    torch.testing.assert_close(first.place.rows.covariance, whole.place.rows.covariance, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(first.place.sensitivity, whole.place.sensitivity, rtol=1e-9, atol=1e-15)
    again = HeadsCollector(copy.deepcopy(place), 32)
    again.restore(whole.state())
    assert again.place.samples == whole.place.samples


# All the way


@pytest.mark.filterwarnings("ignore:.*the covariance has no full rank")
@pytest.mark.parametrize(("layout", "budget"), [("grouped", 0.85)])
@pytest.mark.slow
def test_plans_use_heads_where_they_pay(layout: str, budget: float, tmp_path: Path) -> None:
    make, data = LAYOUTS[layout]
    model, batches = make(), [data(8, seed=seed) for seed in range(4)]
    families = ("heads",)
    result = linearize.compress(model, batches, flops=budget, search=0, families=families, **QUIET)
    chosen = [site for site in result.plan.sites if site.form == HEADS]
    assert chosen
    assert all(site.dropped and site.channels > len(site.dropped) for site in chosen)
    assert result.report.outcome is not None
    assert result.report.outcome.met
    plan = Plan.from_json(result.plan.to_json())
    assert plan == result.plan
    if layout != "grouped":
        return
    again = linearize.compress(model, batches, plan=plan, **QUIET)
    torch.testing.assert_close(logits(again.model, batches[0]), logits(result.model, batches[0]), rtol=1e-4, atol=1e-4)
    linearize.save(result.model, tmp_path / "m")
    loaded = linearize.load(tmp_path / "m")
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), result.model.parameters(), strict=True))
    with pytest.raises(UsageError, match="families"):
        linearize.compress(model, batches, plan=plan, families=("channels",), **QUIET)


def test_a_plan_for_other_heads_is_refused() -> None:
    gated, places = prepared("grouped")
    found = HeadPlaces({place.name: place for place in places})
    plan = SitePlan(places[0].name, HEADS, (1,), dropped=(1,), channels=4)
    again = AttentionHeads().replay(found, plan, None)
    assert again is not None
    assert again.choice == SiteChoice(places[0].name, 3, form=HEADS, gone=(1,))
    for wrong in (replace(plan, channels=8), replace(plan, dropped=(0, 1, 2, 3), linear=(0, 1, 2, 3))):
        with pytest.raises(UsageError, match="units"):
            AttentionHeads().replay(found, wrong, None)
    assert AttentionHeads().replay(found, replace(plan, site="elsewhere"), None) is None
    with pytest.raises(UsageError, match=r"found 'hats'.*Known are channels, blocks"):
        linearize.compress(gated, [tokens()], flops=0.8, families=("hats",), **QUIET)


@pytest.mark.slow
def test_a_plan_may_be_told_to_leave_heads_alone() -> None:
    model, data = llama(), [tokens(4, 12, seed) for seed in range(3)]
    plan = linearize.compress(model, data, params=0.8, families=["channels", "heads"], dry_run=True, **QUIET).plan
    assert any(site.form == HEADS for site in plan.sites)
    stay = replace(plan, sites=tuple(
        replace(site, form="unchanged", linear=(), dropped=()) if site.form == HEADS else site for site in plan.sites
    ))  # fmt: skip
    result = linearize.compress(model, data, plan=stay, families=["channels", "heads"], **QUIET)
    assert not any(site.form == HEADS for site in result.plan.sites)
    heads = [layer.self_attn.o_proj.in_features for layer in result.model.model.layers]  # type: ignore[union-attr]
    assert heads == [layer.self_attn.o_proj.in_features for layer in model.model.layers]  # type: ignore[union-attr]
    nowhere = replace(stay, sites=(*stay.sites, replace(stay.sites[0], site="nowhere", form="unchanged")))
    with pytest.raises(UsageError, match="nowhere: is in the plan, but not in the model"):
        linearize.compress(model, data, plan=nowhere, families=["channels", "heads"], **QUIET)
