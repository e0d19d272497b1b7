"""Mixtures of experts: found by structure, experts removed exactly or narrowed, chosen, saved, and generated with."""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import linearize
from linearize.cost import cost
from linearize.errors import CheckpointError, ConvertError, UsageError
from linearize.families.experts import collect
from linearize.families.experts.apply import slice_channels, slice_experts, write_down, zero_channels
from linearize.families.experts.collect import ExpertsCollector, changes_of
from linearize.families.experts.family import ExpertPlaces, MixturesOfExperts
from linearize.families.experts.find import Found, mixtures_of
from linearize.families.experts.fit import by_change, by_norm, curve_of, quadratic
from linearize.families.experts.mask import Unpicked
from linearize.families.experts.options import EXPERTS, NARROWER, channels_gone, experts_groups, split
from linearize.families.experts.place import Experts, Slots
from linearize.families.experts.remarks import remarks
from linearize.plan import Plan, SitePlan
from linearize.running.passes import run_passes
from linearize.surgery.specs import build
from linearize.training.distance import real_loss
from linearize.training.probes import projection
from linearize.training.state import read_state, write_state
from tests.chain import off
from tests.mixtures import MIXTURES, List, Masked, gpt_oss, mixtral, net, points, texts
from tests.toys import QUIET

TOLERANCES = {torch.float32: 1e-5, torch.float64: 1e-12}


@functools.cache
def prepared(name: str) -> tuple[Any, list[Experts]]:
    """A model whose experts run one by one, which float64 needs, and its mixtures."""
    model = MIXTURES[name]()
    model.set_experts_implementation("eager")
    found = mixtures_of(model, texts(1)[0])
    assert not found.reasons
    return model, found.places


@functools.cache
def observed(name: str, parts: int = 1) -> tuple[Any, list[Experts]]:
    """The same, having seen data."""
    model, places = prepared(name)
    return model, seen(model, places, texts(8), parts=parts)


def seen(model: nn.Module, places: Sequence[Experts], batches: list[Any], *, parts: int = 1) -> list[Experts]:
    """The places with what a pass found, in parts that are merged."""
    size = -(-len(batches) // parts)
    found: list[ExpertsCollector] = []
    for start in range(0, len(batches), size):
        some = [ExpertsCollector(replace(place, sums=None)) for place in places]
        indices = range(start, min(len(batches), start + size))
        run_passes(model, batches[start : start + size], some, probe=projection, indices=indices, progress=False)
        for mine, theirs in zip(found, some, strict=False):
            mine.merge(theirs)
        found = found or some
    return [collector.place for collector in found]


@torch.no_grad()
def logits(model: Any, batch: Any) -> Tensor:
    """What comes out."""
    found: Tensor = model(**batch).logits if isinstance(batch, dict) else model(batch)
    return found


# What is found


def test_experts_are_found_in_every_layout() -> None:
    banks = {name: [place.bank for place in prepared(name)[1]] for name in MIXTURES}
    assert banks["Qwen3-MoE"] == ["model.layers.1.mlp.experts"]
    assert all(len(some) == 2 for name, some in banks.items() if name != "Qwen3-MoE")
    first = {name: prepared(name)[1][0] for name in MIXTURES}
    assert {(place.count, place.picks, place.narrow) for place in first.values()} == {(6, 2, None)}
    assert {name: place.closed for name, place in first.items() if not place.closed} == {"OLMoE": False}
    assert first["Mixtral"].channels is not None
    assert first["Mixtral"].channels.slots == {"gate_up_proj": Slots(1, 2), "down_proj": Slots(2)}
    woven = first["gpt-oss"].channels
    assert woven is not None
    assert (woven.width, woven.down, woven.bias) == (24, "down_proj", "down_proj_bias")
    assert woven.slots["gate_up_proj"] == Slots(2, 2, woven=True)
    assert woven.slots["gate_up_proj_bias"] == Slots(1, 2, woven=True)
    assert ("model.layers.0.mlp.gate", "num_experts") in first["Mixtral"].attributes


class Bank(nn.Module):
    """Experts in tensors of one's own making: no name tells anything, and sizes are alike."""

    def __init__(self, experts: int = 4, width: int = 8, *, twist: str = "") -> None:
        super().__init__()
        self.a = nn.Parameter(torch.zeros(experts, 8, width))
        self.b = nn.Parameter(torch.zeros(experts, width, 8))
        self.n, self.twist = experts, twist

    def forward(self, weights: Tensor, x: Tensor, which: Tensor) -> Tensor:
        h = torch.einsum("rd,rkdm->rkm", x, self.a.view(self.n, 8, -1)[which]).relu()
        out = torch.einsum("rkm,rkmo->rko", h, self.b[which])
        out = out.tanh() if self.twist == "bent" else out
        return (out * weights[:, :, None]).sum(1)


class Own(nn.Module):
    """A mixture with such experts."""

    def __init__(self, *, twist: str = "", picks: int = 2) -> None:
        super().__init__()
        self.choose, self.bank, self.twist, self.picks = nn.Linear(8, 4), Bank(twist=twist), twist, picks
        self.scale = nn.Parameter(torch.randn(3, 4)) if twist == "counted" else None
        if twist == "two":
            self.other = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        scores = self.choose(x)
        if self.twist == "two":
            scores = scores + self.other(x)
        if self.scale is not None:
            scores = scores + self.scale.sum(0)
        if self.twist == "mixed":
            x = x - x.mean(0)
        values, which = scores.topk(self.picks, -1)
        out: Tensor = self.bank(values.softmax(-1), x, which)
        return out + self.bank(values, x, which) if self.twist == "twice" else out


def found_in(**options: Any) -> Found:
    """What is found in a net with mixtures of one's own."""
    return mixtures_of(net(lambda: Own(**options)), points(1)[0])


def test_experts_of_ones_own_and_why_they_stay() -> None:
    found = found_in()
    assert [(p.bank, p.given, p.picks) for p in found.places] == [(f"mixtures.{i}.bank", (1, 2, 0), 2) for i in (0, 1)]
    channels = found.places[0].channels
    assert channels is not None
    assert channels.down == "b"  # by trying: both tensors have the shape (4, 8, 8)
    assert found.places[0].attributes == {
        ("mixtures.0.choose", "out_features"): "experts",
        ("mixtures.0.bank", "n"): "experts",
    }
    bent = found_in(twist="bent").places
    assert len(bent) == 2
    assert "not their last matrix times their channels" in str(bent[0].narrow)
    for twist, why in {
        "two": "found 2 modules beside it",
        "counted": "does not run without an expert",
        "mixed": "depends on other tokens",
        "twice": "is called 2 times",
    }.items():
        found = found_in(twist=twist)
        assert not any(place.fixed is None for place in found.places), twist
        assert all(why in reason for reason in found.reasons.values()), found.reasons
        assert len(found.reasons) == 2
        assert len(found.places) == (2 if twist in ("counted", "mixed") else 0)  # which can be narrower
    assert "picks all of its 4 experts" in found_in(picks=4).reasons["mixtures.0.bank"]
    hooked = net(Own)
    hooked.mixtures[0].get_submodule("choose").register_forward_hook(lambda *_: None)
    assert "hook" in mixtures_of(hooked, points(1)[0]).reasons["mixtures.0.bank"]
    chosen = linearize.convert(net(Own), points(1)[0], include="act")
    assert not mixtures_of(chosen, points(1)[0]).reasons  # there is nothing else to choose among
    tied = net(Own)
    tied.mixtures[1].get_submodule("choose").weight = tied.mixtures[0].get_submodule("choose").weight
    assert "another name" in mixtures_of(tied, points(1)[0]).reasons["mixtures.0.bank"]


def test_plain_models_have_no_experts() -> None:
    layers = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 6))
    found = mixtures_of(layers, torch.randn(3, 6))
    assert (found.places, found.reasons) == ([], {})
    stacked = nn.Module.__new__(nn.Sequential)
    nn.Sequential.__init__(stacked, nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6)])[0], nn.Linear(6, 2))
    assert not mixtures_of(stacked, torch.randn(3, 6)).places


# What is exact


@pytest.mark.parametrize("name", MIXTURES)
def test_an_expert_less_is_a_logit_of_minus_infinity(name: str) -> None:
    model, places = prepared(name)
    batch = texts(1, seed=5)[0]
    for dtype, tolerance in TOLERANCES.items():
        whole, small = copy.deepcopy(model).to(dtype), copy.deepcopy(model).to(dtype)
        gone = dict(zip((place.router for place in places), ((0, 2, 5), (1, 3)), strict=False))
        with Masked({id(whole.get_submodule(router).weight): some for router, some in gone.items()}):
            expected = logits(whole, batch)
        for place in places:
            slice_experts(small, place, gone[place.router])
        assert off(logits(small, batch), expected) <= tolerance
        assert off(logits(whole, batch), expected) > 0.05  # these experts mattered
        assert small.get_submodule(places[0].bank).num_experts == 3


@pytest.mark.parametrize("name", MIXTURES)
def test_a_channel_less_is_a_channel_that_nothing_reads(name: str) -> None:
    model, places = prepared(name)
    batch = texts(1, seed=5)[0]
    for dtype, tolerance in TOLERANCES.items():
        whole = copy.deepcopy(model).to(dtype)
        zeroed, small = copy.deepcopy(whole), copy.deepcopy(whole)
        for place in places:
            assert place.channels is not None
            keep = torch.rand(place.count, place.channels.width).argsort(1)[:, :4].sort(1).values
            zero_channels(zeroed, place, keep)
            slice_channels(small, place, keep)
        assert off(logits(small, batch), logits(zeroed, batch)) <= tolerance
        assert off(logits(whole, batch), logits(zeroed, batch)) > 0.05


@pytest.mark.parametrize("biased", [False, True])
def test_a_module_less_in_a_list(biased: bool) -> None:
    model = net(lambda: List(biased=biased))
    found = mixtures_of(model, points(1)[0])
    assert [(place.count, place.picks, place.listed) for place in found.places] == [(5, 2, True)] * 2
    for dtype, tolerance in TOLERANCES.items():
        whole, small = copy.deepcopy(model).to(dtype), copy.deepcopy(model).to(dtype)
        x = points(1)[0].to(dtype)
        for place, gone in zip(found.places, ((0, 3, 4), (2,)), strict=True):
            slice_experts(small, place, gone)
        routers = [whole.get_submodule(place.router).weight for place in found.places]
        with Masked({id(routers[0]): (0, 3, 4), id(routers[1]): (2,)}):
            expected = logits(whole, x)
        assert off(logits(small, x), expected) <= tolerance
        assert off(logits(whole, x), expected) > 0.05


def test_routers_are_masked_through_casts() -> None:
    weight, x = torch.randn(3, 4), torch.randn(5, 4)
    with Unpicked([(weight, [2])]):
        cast = x.double() @ weight.double().t()
        plain = functional.linear(x, weight)
    for found in (cast, plain):
        assert found[:, 2].isinf().all()
        assert found[:, :2].isfinite().all()


def test_nobody_misses_an_expert_that_no_token_picks() -> None:
    model = gpt_oss()
    with torch.no_grad():
        model.get_submodule("model.layers.0.mlp.router").bias[3] = -1e4
    batches = texts()
    places = seen(model, mixtures_of(model, batches[0]).places, batches)
    assert int(places[0].sums.rows[3]) == 0
    said = remarks(places)
    assert any("no token picks expert 3, which can go with no change on this data" in text for text in said)
    small = copy.deepcopy(model)
    slice_experts(small, places[0], (3,))
    assert off(logits(small, batches[0]), logits(model, batches[0])) <= 1e-5
    slice_experts(small, places[1], (3,))  # negative control: there it was picked
    assert off(logits(small, batches[0]), logits(model, batches[0])) > 1e-2
    groups = experts_groups(model, places, {}, batches)
    assert groups[0].options[1].choices[0].gone == (3,)
    assert groups[0].options[1].loss < 1e-6 < groups[1].options[1].loss
    assert "grows by its share" in remarks([replace(places[0], closed=False)])[0]


# What a pass finds


@pytest.mark.parametrize("name", ["Mixtral", "gpt-oss"])
def test_parts_merge_to_the_whole(name: str, tmp_path: Path) -> None:
    for one, two in zip(observed(name)[1], observed(name, 3)[1], strict=True):
        first, second = one.sums.state(), two.sums.state()
        for key in first.keys() - {"hidden"}:
            assert torch.allclose(torch.as_tensor(first[key]), torch.as_tensor(second[key]), rtol=1e-9, atol=1e-12), key
        for a, b in zip(one.sums.hidden, two.sums.hidden, strict=True):
            assert a.count == b.count
            assert torch.allclose(a.scatter, b.scatter, rtol=1e-6, atol=1e-8)
        again = ExpertsCollector(replace(one, sums=None))
        write_state(tmp_path / "state.safetensors", first)  # as an interrupted run leaves it
        again.restore(read_state(tmp_path / "state.safetensors"))
        assert torch.equal(again.sums.hidden[0].scatter, one.sums.hidden[0].scatter)
        assert torch.equal(again.sums.felt, one.sums.felt)


def test_what_changes_without_an_expert() -> None:
    model, places = prepared("Qwen3-MoE")
    place = places[0]
    mixture = model.get_submodule(place.path)
    x = torch.randn(20, 16)
    with torch.no_grad():
        y = mixture(x[None])[0]
        index = mixture.gate(x)[2]
        changes = changes_of(mixture, place, x, y, index)
        for expert in range(place.count):
            with Masked({id(mixture.gate.weight): (expert,)}):
                expected = y - mixture(x[None])[0]
            found = (changes * (index == expert)[:, :, None]).sum(1)
            assert off(found, expected) < 1e-5
            assert expected.abs().max() > 0.1


def test_norms_are_those_of_reap() -> None:
    model, (place,) = observed("Qwen3-MoE")
    total, rows = torch.zeros(6, dtype=torch.float64), torch.zeros(6)

    def see(bank: Any, args: tuple[Tensor, ...]) -> None:
        x, index, weight = args
        for slot in range(2):
            given = bank.forward(x, index[:, slot : slot + 1], torch.ones_like(weight[:, :1]))
            total.index_add_(0, index[:, slot], (given.norm(dim=1) * weight[:, slot]).double())
            rows.index_add_(0, index[:, slot], torch.ones(len(x)))

    handle = model.get_submodule(place.bank).register_forward_pre_hook(see)
    for batch in texts(8):
        logits(model, batch)
    handle.remove()
    assert torch.allclose(place.sums.norms, total, rtol=1e-5)
    assert place.sums.rows.tolist() == rows.tolist()
    assert by_norm(place.sums, 6) == (total / rows).argsort().tolist()


def test_predicted_changes_are_of_the_right_size() -> None:
    model, places = observed("Mixtral")
    batches = texts(8)
    for place in places:
        costs = quadratic(place.sums)
        ratios = []
        for expert in range(place.count):
            small = copy.deepcopy(model)
            slice_experts(small, place, (expert,))
            ratios.append(float(costs[expert, expert]) / real_loss(model, small, batches))
        middle = sorted(ratios)[len(ratios) // 2]
        assert 0.2 < middle < 5, ratios  # a second-order estimate of changes that are not small
    assert by_change(costs, 1) == [int(costs.diagonal().argmin())]


def test_refits_beat_zeroing_and_losses_are_predicted() -> None:
    model, places = observed("gpt-oss")
    batches = texts(8)
    for place in places:
        curve = curve_of(model, place)
        assert curve is not None
        keep = [curve.keep(expert, 16) for expert in range(place.count)]
        assert len(set(keep)) > 1  # a choice of each its own
        zeroed, fitted = copy.deepcopy(model), copy.deepcopy(model)
        index = torch.tensor(keep)
        zero_channels(zeroed, place, index)
        for expert in range(place.count):
            weight = curve.weights[expert].clone()
            weight[:, list(keep[expert])] = curve.refitted(expert, keep[expert]).weight
            write_down(fitted, place, expert, weight, curve.refitted(expert, keep[expert]).bias)
        slice_channels(fitted, place, index)
        lost = real_loss(model, fitted, batches)
        assert lost < real_loss(model, zeroed, batches)
        assert 0.1 < curve.loss(16) / lost < 10


def test_a_part_of_the_tokens_tells_about_all(monkeypatch: pytest.MonkeyPatch) -> None:
    model, (whole,) = observed("Qwen3-MoE")
    monkeypatch.setattr(collect, "_LOOKED", 24)
    (half,) = seen(model, [whole], texts(8))
    assert (half.sums.tokens, half.sums.looked) == (whole.sums.tokens, whole.sums.tokens / 2)
    assert torch.equal(half.sums.rows, whole.sums.rows)
    one, two = quadratic(whole.sums).diagonal(), quadratic(half.sums).diagonal()
    assert 0.5 < float(two.sum() / one.sum()) < 2
    curves = [curve_of(model, place) for place in (whole, half)]
    losses = [curve.loss(8) for curve in curves if curve is not None]
    assert 0.5 < losses[1] / losses[0] < 2


def test_experts_of_which_little_is_known() -> None:
    model = mixtral(num_hidden_layers=1)
    with torch.no_grad():
        router = model.get_submodule("model.layers.0.mlp.gate").weight
        router[4] = router[3]  # always behind, or beside, its like
        router[5] = 0
    batches = texts(1, batch=1, length=8)
    (place,) = seen(model, mixtures_of(model, batches[0]).places, batches)
    curve = curve_of(model, place)
    assert curve is not None
    unseen = [expert for expert, rows in enumerate(place.sums.rows.tolist()) if not rows]
    said = " ".join(remarks([place]))
    assert "few tokens pick" in said
    assert "drawn towards" in said
    for expert in range(place.count):
        keep = curve.keep(expert, 8)
        found = curve.refitted(expert, keep)
        assert found.weight.isfinite().all()
        if expert in unseen:  # nothing is known of it: what stays is what it was
            assert torch.allclose(found.weight, curve.weights[expert][:, list(keep)])


# Plans


def test_channels_of_a_plan_are_told_apart() -> None:
    place = prepared("Qwen3-MoE")[1][0]
    keep = {expert: (expert, 7, 9) for expert in range(5)}
    gone = channels_gone(place, [5], keep)
    assert len(gone) == 72 - 15
    assert split(place, gone) == ((5,), keep)
    assert split(place, gone[1:]) is None  # not equally many


@pytest.mark.parametrize("name", MIXTURES)
@pytest.mark.slow
def test_a_budget_is_met_and_the_result_loads_and_generates(name: str, tmp_path: Path) -> None:
    model, data = MIXTURES[name](), texts(3)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    stock = name in ("Qwen3-MoE", "gpt-oss")
    result = linearize.compress(
        model, data, params=0.7, families=["channels", "experts"], stock=stock, search=0, **QUIET
    )
    assert result.report.outcome is not None
    assert result.report.outcome.met
    assert result.report.after.parameters <= 0.7 * result.report.before.parameters
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    forms = {site.form for site in result.plan.sites}
    assert forms & {EXPERTS, NARROWER}
    small: Any = result.model
    banks = [module for path, module in small.named_modules() if path.endswith(".experts")]
    sizes = {(bank.num_experts, bank.down_proj.shape[0]) for bank in banks}
    assert all(a == b for a, b in sizes)
    assert not stock or len(sizes) == 1
    if len(sizes) == 1:
        assert (small.config.num_experts, small.num_experts) == (banks[0].num_experts, banks[0].num_experts)
    linearize.save(small, tmp_path / "small.safetensors")
    loaded: Any = linearize.load(tmp_path / "small.safetensors")
    ids = data[0]["input_ids"]
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), small.parameters(), strict=True))
    assert off(logits(loaded, data[0]), logits(small, data[0])) <= 1e-5  # kernels may depend on where tensors lie
    tokens = [m.generate(ids, max_new_tokens=4, do_sample=False) for m in (small, loaded)]
    assert torch.equal(*tokens)
    assert loaded.config.to_dict() == small.config.to_dict()
    if stock:
        ordinary: Any = linearize.zoo.stock_copy(small, data[0])
        ordinary.save_pretrained(tmp_path / "stock")
        from transformers import AutoModelForCausalLM

        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "stock")
        assert type(plain) is type(model)
        assert off(logits(plain, data[0]), logits(small, data[0])) <= 1e-5


@pytest.mark.slow
def test_a_plan_is_carried_out_again() -> None:
    model, data = mixtral(num_hidden_layers=1), texts(2)
    asked: dict[str, Any] = {"families": ["experts"], **QUIET}
    bank = "model.layers.0.mlp.experts"
    result = linearize.compress(model, data, params=0.6, **asked)
    plan = Plan.from_json(result.plan.to_json())
    again = linearize.compress(model, data, plan=plan, **asked)
    assert torch.equal(logits(again.model, data[0]), logits(result.model, data[0]))
    fewer = Plan((SitePlan(bank, EXPERTS, (0, 4), dropped=(0, 4), channels=6),))
    small: Any = linearize.compress(model, data, plan=fewer, **asked).model
    assert small.config.num_local_experts == small.get_submodule(bank).num_experts == 4
    with Masked({id(model.get_submodule("model.layers.0.mlp.gate").weight): (0, 4)}):
        expected = logits(model, data[0])
    assert off(logits(small, data[0]), expected) <= 1e-5
    places = ExpertPlaces({place.name: place for place in mixtures_of(model, data[0]).places})
    for wrong in (
        SitePlan(bank, EXPERTS, (0,), dropped=(0,), channels=5),
        SitePlan(bank, EXPERTS, (0, 1, 2, 3, 4), dropped=(0, 1, 2, 3, 4), channels=6),
        SitePlan(bank, NARROWER, (0, 1), dropped=(0, 1), channels=6 * 24),
    ):
        with pytest.raises(UsageError, match="Make the plan from this model"):
            MixturesOfExperts().replay(places, wrong, None)


@pytest.mark.slow
def test_a_list_of_modules_becomes_shorter(tmp_path: Path) -> None:
    model, data = net(), points()
    result = linearize.compress(model, data, params=0.6, families=["experts"], **QUIET)
    assert result.report.outcome is not None
    assert result.report.outcome.met
    lists = [len(mixture.get_submodule("experts")._modules) for mixture in result.model.mixtures]  # type: ignore[union-attr]
    assert lists == [mixture.get_submodule("router").out_features for mixture in result.model.mixtures]  # type: ignore[union-attr]
    assert max(lists) < 5
    linearize.save(result.model, tmp_path / "small.safetensors")
    loaded = linearize.load(tmp_path / "small.safetensors", model=net())
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), result.model.parameters(), strict=True))
    assert off(logits(loaded, data[0]), logits(result.model, data[0])) <= 1e-5
    again = linearize.compress(model, data, plan=Plan.from_json(result.plan.to_json()), families=["experts"], **QUIET)
    assert torch.equal(logits(again.model, data[0]), logits(result.model, data[0]))


def _nothing(*_: object) -> None:
    """A hook."""


def test_reasons_stand_in_the_report_and_nothing_to_do_is_an_error() -> None:
    model = mixtral(num_hidden_layers=1)
    model.get_submodule("model.layers.0.mlp.gate").register_forward_hook(_nothing)
    with pytest.raises(ConvertError, match="none of its 1 activations can get a gate"):
        linearize.convert(model, texts(1)[0])
    with pytest.raises(ConvertError, match="none of its 1 activations can get a gate"):
        linearize.compress(model, texts(1), params=0.7, families=["experts"], **QUIET)
    with pytest.raises(ConvertError, match="none of its 1 activations can get a gate"):
        linearize.compress(mixtral(num_hidden_layers=1), texts(1), linear=0.5, **QUIET)
    dense = mixtral(num_hidden_layers=1, num_experts_per_tok=6)
    result = linearize.compress(dense, texts(2), params=0.8, families=["experts"], **QUIET)
    assert any("picks all of its 6 experts" in note for note in result.report.notes)
    assert {site.form for site in result.plan.sites if site.dropped} == {NARROWER}  # all of them stay
    assert {len(site.dropped) % 6 for site in result.plan.sites} == {0}


# What else had to learn of experts


def test_products_of_many_matrices_are_counted() -> None:
    batch = texts(1)[0]
    model = mixtral()
    counts = {}
    for way in ("grouped_mm", "eager"):
        model.set_experts_implementation(way)
        counts[way] = cost(model, batch).flops
    assert counts["grouped_mm"] == counts["eager"]


def test_a_file_cannot_make_tensors_larger() -> None:
    layer = nn.Linear(4, 3)
    for shapes in ({"weight": [4, 4]}, {"weight": [3]}, {"other": [1]}):
        with pytest.raises(CheckpointError):
            build({"type": "Smaller", "shapes": shapes}, nn.Linear(4, 3))
    made: Any = build({"type": "Smaller", "shapes": {"weight": [2, 4]}}, layer)
    assert made is layer
    assert made.weight.shape == (2, 4)


def test_frozen_tensors_stay_frozen() -> None:
    model, places = prepared("Mixtral")
    small = copy.deepcopy(model)
    bank = small.get_submodule(places[0].bank)
    bank.down_proj.requires_grad_(False)
    slice_experts(small, places[0], (1,))
    assert not bank.down_proj.requires_grad
    assert bank.gate_up_proj.requires_grad
