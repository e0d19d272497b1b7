"""Attention as one linear map, or nothing, in models that generate: its cache goes, layers behind are renumbered."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import linearize
from linearize.cost import cost
from linearize.errors import UsageError
from linearize.families.attention.collect import AttentionCollector
from linearize.families.attention.family import AttentionPlaces, Attentions
from linearize.families.attention.find import attention_wholes
from linearize.families.attention.options import ATTENTION
from linearize.families.depth.options import DEPTH
from linearize.families.family import Context
from linearize.families.heads.options import HEADS
from linearize.families.modules.find import wholes_of
from linearize.families.modules.fit import fit_whole
from linearize.families.modules.options import WHOLE_MODULE
from linearize.families.option import SiteChoice
from linearize.gating.groups import groups_of
from linearize.plan import SitePlan
from linearize.running.passes import run_passes
from linearize.surgery.only import OnlyLinear
from linearize.surgery.skipped import Silent, Skipped
from linearize.surgery.specs import build, spec_of
from linearize.training.distance import real_loss
from linearize.training.probes import projection
from tests.attentions import bert, cache_bytes, cache_of, generated, images, llama, tokens, vit
from tests.test_modules import Layer
from tests.toys import QUIET


def surveyed(model: nn.Module, batches: list[Any]) -> tuple[nn.Module, Context, AttentionPlaces]:
    """A gated model, and its attentions with maps."""
    gated = linearize.convert(model, batches[0])
    context = Context(gated, batches[0], batches, "flops")
    wholes, reasons = attention_wholes(gated, batches[0])
    assert not reasons
    run_passes(gated, batches, [AttentionCollector(whole) for whole in wholes], probe=projection, progress=False)
    fits = {whole.path: found for whole in wholes if (found := fit_whole(whole)) is not None}
    return gated, context, AttentionPlaces({whole.path: whole for whole in wholes}, fits)


def replaced(survey: tuple[nn.Module, Context, AttentionPlaces], maps: list[int], nothing: list[int]) -> Any:
    """The model with some attentions replaced by their maps, others left out; collapsed."""
    gated, context, places = survey
    made = copy.deepcopy(gated)
    choices = {f"model.layers.{i}.self_attn": SiteChoice("", 0, 32, ATTENTION) for i in maps}
    choices |= {f"model.layers.{i}.self_attn": SiteChoice("", 0, 0, ATTENTION, (0,)) for i in nothing}
    Attentions().apply(made, context, places, choices, {})
    return linearize.collapse(made)


@pytest.fixture(scope="module")
def batches() -> list[dict[str, Tensor]]:
    return [tokens(8, 12, seed) for seed in range(4)]


@pytest.fixture(scope="module")
def survey(batches: list[Any]) -> tuple[nn.Module, Context, AttentionPlaces]:
    return surveyed(llama(layers=3), batches)


def test_generation_without_some_attentions(survey: tuple[nn.Module, Context, AttentionPlaces], tmp_path: Path) -> None:
    for maps, nothing in (([0], []), ([1], [2])):
        small = replaced(survey, maps, nothing)
        left = [layer.self_attn for layer in small.model.layers if hasattr(layer.self_attn, "layer_idx")]
        assert [attention.layer_idx for attention in left] == list(range(3 - len(maps) - len(nothing)))
        truth = small.generate(
            input_ids=tokens(3, 7)["input_ids"], attention_mask=torch.ones(3, 7, dtype=torch.long),
            max_new_tokens=6, do_sample=False, use_cache=False,
        )  # fmt: skip
        for cache in (None, "static"):
            assert torch.equal(generated(small, cache=cache, padded=False), truth)
        assert torch.equal(generated(small, cache="static"), generated(small))
        assert 3 * cache_bytes(cache_of(small, tokens())) == len(left) * cache_bytes(cache_of(survey[0], tokens()))
        linearize.save(small, tmp_path / "m")
        loaded = linearize.load(tmp_path / "m")
        assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), small.parameters(), strict=True))
        assert torch.equal(generated(loaded), generated(small))


def steps_and_whole(model: Any) -> float:
    """How far the last logits are off if they are computed with a cache of what came before."""
    ids = tokens(2, 8)["input_ids"]
    with torch.no_grad():
        first = model(input_ids=ids[:, :6], use_cache=True)
        cache = first["cache"] if "cache" in first else first["past_key_values"]
        name = "cache" if "cache" in first else "past_key_values"
        second = model(input_ids=ids[:, 6:], **{name: cache}).logits
        whole = model(input_ids=ids).logits[:, 6:]
    return float((second - whole).abs().max() / whole.abs().max())


def test_without_new_numbers_a_cache_is_read_wrongly(survey: tuple[nn.Module, Context, AttentionPlaces]) -> None:
    """Negative control: with a gap at 0, positions are counted from an entry that stays empty."""
    small: Any = replaced(survey, [0], [])
    assert steps_and_whole(small) <= 1e-5
    for index, layer in enumerate(small.model.layers):
        if index:
            layer.self_attn.layer_idx = index
    with pytest.raises(UsageError, match="found a cache with 1 more layers"):
        steps_and_whole(small)
    small._forward_pre_hooks.clear()  # as if nobody looked at the cache
    small._forward_pre_hooks_with_kwargs.clear()
    assert steps_and_whole(small) > 1e-2


def test_a_map_is_a_plain_one_and_told_caches_only_where_it_may(
    survey: tuple[nn.Module, Context, AttentionPlaces],
) -> None:
    small = replaced(survey, [1], [])
    layer = small.model.layers[1].self_attn
    assert type(layer) is OnlyLinear
    assert dict(layer.linear.named_parameters()).keys() == {"weight"}  # as this attention's own maps have none
    assert OnlyLinear(8, 8, caches=True)(torch.ones(1, 8), object()).shape == (1, 8)
    with pytest.raises(UsageError, match="told no object"):
        OnlyLinear(8, 8)(torch.ones(1, 8), object())


def test_a_plan_says_what_stands_for_an_attention(survey: tuple[nn.Module, Context, AttentionPlaces]) -> None:
    places, path = survey[2], "model.layers.1.self_attn"
    for rank, gone in ((32, ()), (0, (0,))):
        plan = SitePlan(path, ATTENTION, gone, rank=rank, dropped=gone)
        again = Attentions().replay(places, plan, None)
        assert again is not None
        assert again.choice == SiteChoice(path, 0, rank, ATTENTION, gone)
    inner = Attentions().replay(places, SitePlan(f"{path}.o_proj", ATTENTION, ()), None)
    assert inner is not None
    assert (inner.choice.rank, inner.choice.gone) == (0, ())
    assert Attentions().replay(places, SitePlan("elsewhere", ATTENTION, ()), None) is None


@pytest.mark.slow
def test_costs_and_losses_are_exact(
    survey: tuple[nn.Module, Context, AttentionPlaces], batches: list[dict[str, Tensor]]
) -> None:
    gated, context, places = survey
    groups = {group.sites[0]: group for group in Attentions().options(context, places, [])}
    assert len(groups) == 2  # of three: one stays
    before = cost(linearize.collapse(gated), batches[0])
    for path, group in groups.items():
        index = int(path.split(".")[2])
        found = {str(option): option for option in group.options[1:]}
        for told, small in (
            ("attention as one linear map of rank 32", replaced(survey, [index], [])),
            ("attention left out", replaced(survey, [], [index])),
        ):
            if told not in found:  # hopeless
                continue
            after = cost(small, batches[0])
            assert before.parameters - after.parameters == group.stay.params - found[told].params
            assert before.flops - after.flops == group.stay.flops - found[told].flops
            assert found[told].loss == pytest.approx(real_loss(gated, small, batches), rel=1e-3)


@pytest.mark.slow
def test_where_attention_stays_and_why() -> None:
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    config = Gemma3TextConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=4, vocab_size=64, layer_types=["sliding_attention", "full_attention"], pad_token_id=0,
    )  # fmt: skip
    found, reasons = attention_wholes(linearize.convert(Gemma3ForCausalLM(config).eval(), tokens()), tokens())
    assert not found
    assert len(reasons) == 2
    assert all("in different ways" in why for why in reasons.values())

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.block, self.head = nn.Linear(8, 8), Layer(8), nn.Linear(8, 2)

        def can_generate(self) -> bool:
            return True

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.head(self.block(self.first(x)))
            return out

    x = torch.randn(2, 5, 8)
    own = Own().eval()
    assert not hasattr(own.block.mixer, "layer_idx")
    found, reasons = attention_wholes(linearize.convert(own, x), x)
    assert not found
    assert reasons
    assert all("not known" in why for why in reasons.values())


def test_wide_modules_may_become_one_map() -> None:
    model = nn.Sequential(nn.Linear(8, 2100), Layer(2100), nn.Linear(2100, 2)).eval()
    x = torch.randn(2, 3, 8)
    gated = linearize.convert(model, x)
    assert {whole.path for whole in wholes_of(gated, x, groups_of(gated))} == {"1", "1.mixer"}


@pytest.mark.filterwarnings("ignore:.*the covariance has no full rank")
@pytest.mark.parametrize(("name", "budget"), [("llama", 0.5), ("vit", 0.5), ("bert", 0.5)])
@pytest.mark.slow
def test_plans_use_the_new_families_where_they_pay(name: str, budget: float, tmp_path: Path) -> None:
    make: Any = {"llama": llama, "vit": vit, "bert": bert}[name]
    model = make(layers=3)
    batches: list[Any] = [images(8, seed) if name == "vit" else tokens(8, 12, seed) for seed in range(4)]
    result: Any = linearize.compress(model, batches, flops=budget, search=2, **QUIET)
    assert result.report.outcome.met
    assert {site.form for site in result.plan.sites} & {HEADS, ATTENTION, DEPTH}
    assert result.report.outcome.predicted == pytest.approx(result.report.outcome.reached, abs=0.01)
    linearize.save(result.model, tmp_path / "m")
    loaded = linearize.load(tmp_path / "m")
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), result.model.parameters(), strict=True))
    if name != "llama":
        return
    assert torch.equal(generated(loaded, cache="static"), generated(result.model))
    assert cache_bytes(cache_of(result.model, batches[0])) <= cache_bytes(cache_of(model, batches[0]))
    assert all(site.form != WHOLE_MODULE or not site.rank for site in result.plan.sites)


def test_what_gives_nothing_is_described_and_exported() -> None:
    for made in (Silent("x", 1), Skipped("x", 1, rows=True, indices=(2,))):
        again = build(spec_of(made), nn.Linear(4, 4))
        assert spec_of(again) == spec_of(made)
        program = torch.export.export(again, (torch.ones(2, 4),))
        out = program.module()(torch.full((2, 4), 3.0))
        assert out[1] is None
        assert torch.equal(out[0], torch.full((2, 4), 3.0 * isinstance(made, Skipped)))
