"""Layers that go: chains found, maps merged exactly, lists closed up; what is left is a stock model that generates."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import linearize
from linearize import zoo
from linearize.cost import cost
from linearize.errors import CheckpointError
from linearize.families.depth.apply import merge_map, skip_layers
from linearize.families.depth.collect import DepthCollector
from linearize.families.depth.find import chains_of
from linearize.families.depth.fit import DepthMap, fit_run
from linearize.families.depth.options import DEPTH, Runs, with_layers
from linearize.families.depth.place import LayerChain, LayerSums
from linearize.families.enclosing import homes_of
from linearize.families.option import Group
from linearize.gating.groups import groups_of
from linearize.plan import Plan
from linearize.running.passes import run_passes
from linearize.running.rows import outliers_down
from linearize.surgery.attributes import fewer_in
from linearize.surgery.skipped import Skipped, shorten
from linearize.training.distance import real_loss
from tests.attentions import bert, cache_bytes, cache_of, generated, gpt2, images, llama, logits, tokens, vit
from tests.chain import off
from tests.toys import QUIET


def surveyed(model: nn.Module, batches: list[Any]) -> tuple[nn.Module, LayerChain, Runs, list[Group]]:
    """A gated model, its chain with sums, what stands for runs, and the groups of its layers."""
    gated = linearize.convert(model, batches[0])
    homes = homes_of(gated, groups_of(gated))
    (chain,) = chains_of(gated, batches[0], homes)
    last = len(chain.layers) - 1
    watched = [DepthCollector(chain, i, last - i) for i in range(last) if chain.layers[i].out is not None]
    run_passes(gated, batches, watched, progress=False)
    runs = Runs(gated, chain)
    return gated, chain, runs, with_layers([], [runs], homes, batches)


@pytest.fixture(scope="module")
def four() -> tuple[list[Any], tuple[nn.Module, LayerChain, Runs, list[Group]]]:
    """A decoder of four layers, surveyed."""
    batches: list[Any] = [tokens(8, 12, seed) for seed in range(4)]
    return batches, surveyed(llama(layers=4), batches)


Four = tuple[list[Any], tuple[nn.Module, LayerChain, Runs, list[Group]]]


# What is found


@pytest.mark.slow
def test_chains_of_layers_and_their_projections() -> None:
    wanted = {
        "model.layers.1.mlp.down_proj": (llama, tokens()),
        "transformer.h.1.mlp.c_proj": (gpt2, tokens()),
        "blocks.1.mlp.fc2": (vit, images()),
        None: (bert, tokens()),  # a norm stands behind the sum
    }
    for name, (make, batch) in wanted.items():
        gated = linearize.convert(make(), batch)
        (chain,) = chains_of(gated, batch, homes_of(gated, groups_of(gated)))
        out = chain.layers[1].out
        assert (None if out is None else out.module) == name
        assert chain.free == [0, 1]


class Twice(nn.Module):
    def __init__(self, *, also: bool = False) -> None:
        super().__init__()
        self.up, self.act, self.down, self.also = nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 6), also

    def forward(self, x: Tensor) -> Any:
        y = x + self.down(self.act(self.up(x)))
        return (y, y.mean()) if self.also else y


class Stack(nn.Module):
    def __init__(self, kind: str = "") -> None:
        super().__init__()
        self.layers = nn.ModuleList(Twice(also=kind == "also") for _ in range(3))
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        for index in range(3) if self.kind == "counted" else range(len(self.layers)):
            x = self.layers[index](x)
            x = x[0] if self.kind == "also" else x
            x = 2 * x if self.kind == "between" else x
        return x


def test_layers_of_ones_own_and_why_they_stay() -> None:
    x = torch.randn(4, 6)

    def found(kind: str) -> list[LayerChain]:
        gated = linearize.convert(Stack(kind).eval(), x)
        return chains_of(gated, x, homes_of(gated, groups_of(gated)))

    assert [layer.out is not None and layer.reason is None for layer in found("")[0].layers] == [True] * 3
    assert found("between") == []  # not a chain
    assert {layer.reason for layer in found("also")[0].layers} == {"it gives more than one tensor"}
    assert "takes no shorter list" in str(found("counted")[0].layers[0].reason)
    excluded = linearize.convert(Stack().eval(), x, exclude="layers.1.act")
    reasons = [layer.reason for layer in chains_of(excluded, x, homes_of(excluded, groups_of(excluded)))[0].layers]
    assert reasons[1] is not None
    assert "excluded" in reasons[1]


# What is exact


@pytest.mark.parametrize("make", [llama, gpt2, vit])
@pytest.mark.slow
def test_a_map_is_merged_exactly_and_the_list_closes_up(make: Any) -> None:
    batch: Any = images() if make is vit else tokens()
    gated = linearize.convert(make(layers=3) if make is not gpt2 else gpt2(), batch).double()
    batch = batch.double() if make is vit else batch
    (chain,) = chains_of(gated, batch, homes_of(gated, groups_of(gated)))
    last = len(chain.layers) - 1
    first, width = chain.layers[0], chain.layers[0].shape[-1]
    assert first.out is not None
    biased = gated.get_submodule(first.out.module)._parameters.get("bias") is not None
    generator = torch.Generator().manual_seed(0)
    matrix = 0.2 * torch.randn(width, width, generator=generator, dtype=torch.float64)
    shift = torch.randn(width, generator=generator, dtype=torch.float64) * float(biased)

    seen: dict[str, Tensor] = {}
    hooks = [
        gated.get_submodule(path).register_forward_hook(lambda _, __, out, path=path: seen.update({path: out}))
        for path in (first.path, first.out.module)
    ]
    before = logits(gated, batch)
    for hook in hooks:
        hook.remove()
    wanted = seen[first.path] + seen[first.out.module] @ matrix.t() + shift

    edited = copy.deepcopy(gated)
    assert merge_map(edited, chain, 0, DepthMap(matrix, shift))
    hook = edited.get_submodule(first.path).register_forward_hook(lambda _, __, out: seen.update(now=out))
    logits(edited, batch)
    hook.remove()
    assert off(seen["now"], wanted) <= 1e-12
    assert off(seen["now"], seen[first.path]) > 1e-2  # negative control: the map is not nothing

    skip_layers(edited, chain, [last])
    skipped = logits(edited, batch)
    small = linearize.collapse(edited)
    assert not any(isinstance(module, Skipped) for module in small.modules())
    assert off(logits(small, batch), skipped) <= 1e-12
    assert off(before, skipped) > 1e-2
    path = first.path.rpartition(".")[0]
    assert len(small.get_submodule(path)._modules) == last
    if last > 1:  # another layer gone is another function
        other = copy.deepcopy(gated)
        skip_layers(other, chain, [1])
        assert off(logits(other, batch), skipped) > 1e-2


def without(model: nn.Module, batch: Any, gone: list[int]) -> nn.Module:
    gated = linearize.convert(model, batch)
    (chain,) = chains_of(gated, batch, homes_of(gated, groups_of(gated)))
    skip_layers(gated, chain, gone)
    return linearize.collapse(gated)


@pytest.mark.slow
def test_what_is_left_is_a_stock_model_that_generates(tmp_path: Path) -> None:
    model: Any = llama(layers=4)
    small: Any = without(model, tokens(), [0, 2])
    assert small.config.num_hidden_layers == 2
    assert model.config.num_hidden_layers == 4  # the user's own stays
    assert [layer.self_attn.layer_idx for layer in small.model.layers] == [0, 1]
    stock: Any = zoo.stock_copy(small, tokens())
    assert stock.config.num_hidden_layers == 2
    stock.save_pretrained(tmp_path / "stock")
    again = type(stock).from_pretrained(tmp_path / "stock").eval()
    assert off(logits(again, tokens()), logits(small, tokens())) <= 1e-5
    ways: list[dict[str, Any]] = [{}, {"cache": "static"}, {"beams": 3}]
    for options in ways:
        assert torch.equal(generated(small, **options), generated(stock, **options))
    assert cache_bytes(cache_of(small, tokens())) * 2 == cache_bytes(cache_of(model, tokens()))
    assert not torch.equal(generated(small), generated(model))
    linearize.save(small, tmp_path / "m")
    loaded: Any = linearize.load(tmp_path / "m")
    pairs = zip(loaded.state_dict().values(), small.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert loaded.config.num_hidden_layers == 2
    assert torch.equal(generated(loaded, cache="static"), generated(small))


@pytest.mark.slow
def test_lists_in_a_configuration_follow(tmp_path: Path) -> None:
    """Layers that look at a window and layers that look at everything keep their kind."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    torch.manual_seed(0)
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    config = Gemma3TextConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        head_dim=4, vocab_size=64, layer_types=kinds, sliding_window=4, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        initializer_range=0.2,
    )  # fmt: skip
    model = Gemma3ForCausalLM(config).eval()
    small: Any = without(model, tokens(), [0])
    assert small.config.layer_types == kinds[1:]
    linearize.save(small, tmp_path / "m")
    loaded: Any = linearize.load(tmp_path / "m")
    assert loaded.config.layer_types == kinds[1:]
    assert torch.equal(generated(loaded), generated(small))
    assert off(logits(zoo.stock_copy(small, tokens()), tokens()), logits(small, tokens())) <= 1e-5


def test_layers_of_ones_own_are_saved(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x, model = torch.randn(4, 6), Stack().eval()
    small = without(model, x, [1])
    linearize.save(small, tmp_path / "m")
    loaded = linearize.load(tmp_path / "m", model=model)
    assert off(logits(loaded, x), logits(small, x)) <= 1e-6
    for wrong in ([1], [0, 0]):
        with pytest.raises(CheckpointError, match="to keep"):
            shorten(nn.ModuleList([nn.ReLU()]), wrong)
    with pytest.raises(CheckpointError, match="tells of its layers"):
        fewer_in(model, "config", ["depth"], [], [0])


# What it costs and loses


def test_rows_that_are_far_longer_than_others_are_weighed_down() -> None:
    generator = torch.Generator().manual_seed(0)
    truth = torch.randn(8, 8, generator=generator, dtype=torch.float64)
    m = torch.randn(400, 8, generator=generator, dtype=torch.float64)
    d = m @ truth.t()
    m[::40] *= 300  # first tokens, which do something else
    d[::40] = -5 * m[::40]
    errors = {}
    for name, weights in (("plain", torch.ones(400)), ("weighed", outliers_down(m))):
        sums = LayerSums(8, 1)
        sums.update(m, d[None], weights)
        found = fit_run(sums, 1, constant=False)
        assert found is not None
        rest = torch.arange(400) % 40 != 0
        left = (m @ found.map.t() - d)[rest].square().sum() / d[rest].square().sum()
        errors[name] = float(left)
    assert errors["weighed"] < 0.1 * errors["plain"]


@pytest.mark.slow
def test_losses_are_those_that_are_measured_and_a_map_is_better_than_nothing(four: Four) -> None:
    batches, (gated, chain, runs, groups) = four
    losses = {group.sites[0]: group.options[1].loss for group in groups}
    order = sorted(losses, key=losses.__getitem__)
    indices = [next(i for i, layer in enumerate(chain.layers) if layer.path == path) for path in order]
    for count in (1, 2):  # in the order in which they go, losses add up to the true one
        edited = copy.deepcopy(gated)
        gone = indices[:count]
        for index, found in runs.maps(gone).items():
            merge_map(edited, chain, index, found)
        skip_layers(edited, chain, gone)
        assert real_loss(gated, edited, batches) == pytest.approx(sum(losses[p] for p in order[:count]), rel=1e-3)
    last = len(chain.layers) - 1
    assert runs.map(last - 1, 1) is not None
    alone = copy.deepcopy(gated)
    skip_layers(alone, chain, [last])
    assert losses[chain.layers[last].path] < real_loss(gated, alone, batches)
    assert len(groups) < len(chain.layers) or len(groups) == len(chain.layers) - 1  # one layer stays


def test_costs_are_exact(four: Four) -> None:
    batch, (gated, chain, _, groups) = four[0][0], four[1]
    whole = cost(linearize.collapse(gated), batch)
    path = groups[0].sites[0]
    index = next(i for i, layer in enumerate(chain.layers) if layer.path == path)
    made = copy.deepcopy(gated)
    skip_layers(made, chain, [index])
    after = cost(linearize.collapse(made), batch)
    assert whole.parameters - after.parameters == groups[0].stay.params
    assert whole.flops - after.flops == groups[0].stay.flops


def test_parts_of_the_data_merge_to_the_whole() -> None:
    batches = [tokens(4, 9, seed) for seed in range(4)]
    gated = linearize.convert(llama(), batches[0])
    (chain,) = chains_of(gated, batches[0], homes_of(gated, groups_of(gated)))
    made = [DepthCollector(copy.deepcopy(chain), 0, 1) for _ in range(4)]
    for collector, some in zip(made, (range(4), range(2), range(2, 4)), strict=False):
        run_passes(gated, [batches[i] for i in some], [collector], indices=some, progress=False)
    whole, first, second, again = made
    first.merge(second)
    again.restore(whole.state())
    for name in ("m", "mm", "d", "dm"):
        torch.testing.assert_close(getattr(first.sums, name), getattr(whole.sums, name), rtol=1e-9, atol=1e-9)
        assert torch.equal(getattr(again.sums, name), getattr(whole.sums, name))
    assert first.sums.count == whole.sums.count > 0


# All the way


@pytest.mark.filterwarnings("ignore:.*the covariance has no full rank")
@pytest.mark.parametrize("name", ["llama"])
@pytest.mark.slow
def test_plans_use_depth_where_it_pays(name: str, tmp_path: Path) -> None:
    make: Any = {"llama": llama, "vit": vit, "bert": bert}[name]
    model = make(layers=3)
    batches = [images(8, seed) if name == "vit" else tokens(8, 12, seed) for seed in range(4)]
    families = ("depth",)
    result: Any = linearize.compress(model, batches, flops=0.5, search=0, families=families, **QUIET)
    gone = [site for site in result.plan.sites if site.form == DEPTH and site.dropped]
    assert gone
    assert result.report.outcome is not None
    assert result.report.outcome.reached < 0.8
    linearize.save(result.model, tmp_path / "m")
    loaded = linearize.load(tmp_path / "m")
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), result.model.parameters(), strict=True))
    if name != "llama":
        return
    plan = Plan.from_json(result.plan.to_json())
    again: Any = linearize.compress(model, batches, plan=plan, families=families, **QUIET)
    assert off(logits(again.model, batches[0]), logits(result.model, batches[0])) <= 1e-4
    assert again.model.config.num_hidden_layers == 3 - len(gone)
    kept = {site.site for site in plan.sites if site.form != DEPTH}
    inside = [site.site for site in plan.sites if site.form == DEPTH and not site.dropped]
    assert all(any(path.startswith(f"{layer.site}.") for layer in gone) for path in inside)
    assert kept | set(inside) | {site.site for site in gone} == {site.site for site in plan.sites}


def test_maps_stand_for_runs(four: Four) -> None:
    gated, chain, _, _ = four[1]
    runs = Runs(gated, chain)
    for gone in itertools.combinations(range(4), 2):
        found = runs.maps(gone)
        expected = {g - 1 for g in gone if g and g - 1 not in gone}
        assert set(found) == expected
    assert chain.layers[0].sums is not None
    two, one = runs.map(0, 2), runs.map(0, 1)
    assert two is not None
    assert one is not None
    assert not torch.equal(two.map, one.map)
