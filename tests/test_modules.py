"""Whole modules that become one linear map: which ones may, what stands for them, and the choice among all options."""

from __future__ import annotations

import itertools
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import linearize
from linearize.compress import compress
from linearize.errors import UsageError
from linearize.families.modules.apply import replace_wholes
from linearize.families.modules.find import wholes_of
from linearize.families.modules.fit import WholeFit, fit_whole
from linearize.families.modules.options import WHOLE_MODULE
from linearize.families.modules.place import Whole
from linearize.families.option import Group, Option, SiteChoice
from linearize.gating.gate import gates
from linearize.gating.groups import groups_of
from linearize.planning.knapsack import choose
from linearize.planning.surveying import Wanted, survey
from linearize.planning.timing.enclosing import with_enclosing_latencies
from linearize.planning.timing.in_place import shares_in_place
from linearize.surgery.only import OnlyLinear
from linearize.training.distance import losses_with
from tests.observing import observe_wholes
from tests.processors import assert_same_outputs, assert_same_tensors, moved
from tests.toys import QUIET

ROOT = Path(__file__).parents[1]  # a new process finds the helpers of the tests here


class Mixer(nn.Module):
    """Attention in small: every position looks at all the others; `strength` 0 makes it the zero map."""

    def __init__(self, width: int, strength: float = 1.0) -> None:
        super().__init__()
        self.norm, self.qk, self.out = nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(width, width)
        self.strength = strength

    def forward(self, x: Tensor, mask: Tensor | None = None, scale: float = 1.0) -> Tensor:
        q, k = self.qk(self.norm(x)).chunk(2, -1)
        return self.strength * scale * self.out((q @ k.transpose(1, 2)).softmax(-1) @ x)


class Layer(nn.Module):
    def __init__(self, width: int = 8, strength: float = 1.0) -> None:
        super().__init__()
        self.mixer = Mixer(width, strength)
        self.mlp = nn.Sequential(nn.Linear(width, 64), nn.GELU(), nn.Linear(64, width))
        self.strength = strength

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mixer(x, mask=None)
        return x + self.strength * self.mlp(x)


def network(*strengths: float) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(8, 8), *(Layer(8, s) for s in strengths), nn.Flatten(), nn.Linear(48, 5)).eval()


@pytest.fixture
def data() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(16, 6, 8, generator=generator) for _ in range(8)]


def found_in(model: nn.Module, x: Any, **options: Any) -> list[str]:
    gated = linearize.convert(model, x, **options)
    return [whole.path for whole in wholes_of(gated, x, groups_of(gated))]


# Which modules


def test_attention_and_residual_blocks_are_found_and_ffns_left_to_their_sites(data: list[Tensor]) -> None:
    gated = linearize.convert(network(1.0, 1.0), data[0])
    wholes = wholes_of(gated, data[0], groups_of(gated))
    assert [(w.path, w.inside, w.sites, w.alone) for w in wholes] == [
        ("1", "", ("1.mlp.1",), True),
        ("1.mixer", "1", (), False),
        ("2", "", ("2.mlp.1",), True),
        ("2.mixer", "2", (), False),
    ]
    assert all((w.inputs, w.outputs, w.axis) == (8, 8, -1) for w in wholes)
    assert wholes[0].params == sum(p.numel() for p in network(1.0)[1].parameters())


def test_channels_of_images_are_behind_the_batch() -> None:
    block = nn.Sequential(nn.Conv2d(4, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 4, 3, padding=1), nn.BatchNorm2d(4))
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sequential(block, nn.Conv2d(4, 4, 3, padding=1)), nn.Flatten(),
                          nn.Linear(64, 2)).eval()  # fmt: skip
    gated = linearize.convert(model, torch.randn(2, 3, 4, 4))
    (whole,) = wholes_of(gated, torch.randn(2, 3, 4, 4), groups_of(gated))
    assert (whole.path, whole.axis) == ("1", -3)  # as wide as the image, so that only the maps inside can tell


class Refusing(nn.Module):
    """A model with one module in the middle that is called in some way."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.first, self.middle, self.last, self.way = nn.Linear(8, 8), Layer(8), nn.Linear(8, 2), way

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if self.way == "twice":
            return self.last(self.middle(self.middle(x)))
        return self.last(self.middle(x))


class Overwriting(Layer):
    def forward(self, x: Tensor) -> Tensor:
        x += self.mlp(x)
        return x + self.mixer(x, mask=None)


class Several(Layer):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x), x


class Listening(Refusing):
    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        extra = {"tensor": torch.ones(6, 6), "cache": [object()], "none": None}[self.way]
        return self.last(x + self.middle.mixer(x, extra) + self.middle.mlp(x))


def test_what_is_no_candidate(data: list[Tensor]) -> None:
    assert found_in(Refusing("once"), data[0]) == ["middle", "middle.mixer"]
    assert found_in(Refusing("twice"), data[0]) == []
    assert found_in(Listening("tensor"), data[0]) == ["middle.mixer"]
    assert found_in(Listening("cache"), data[0]) == []
    listening = Listening("tensor")
    for way in ("tensor", "none"):
        listening.way, listening.can_generate = way, lambda: True  # type: ignore[assignment]
        assert found_in(listening, data[0]) == []
    model = Refusing("once")
    model.middle = Overwriting()
    assert found_in(model, data[0]) == ["middle.mixer"]
    model = Refusing("once")
    model.middle.register_forward_hook(lambda *_: None)
    assert found_in(model, data[0]) == ["middle.mixer"]


def test_a_module_that_gives_several_tensors_is_none(data: list[Tensor]) -> None:
    class Taking(Refusing):
        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.middle(self.first(x))[0])

    model = Taking("once")
    model.middle = Several()
    assert found_in(model, data[0]) == ["middle.mixer"]


class Attending(nn.Module):
    """Called as transformers call attention: the input by keyword, and None for the weights that nobody wants."""

    def __init__(self, told: Any = None) -> None:
        super().__init__()
        self.first, self.mixer, self.last, self.told = nn.Linear(8, 8), Weighing(8), nn.Linear(8, 2), told

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        y, _ = self.mixer(mask=None, hidden=x, told=self.told)
        return self.last(x + y)


class Weighing(Mixer):
    def forward(self, hidden: Tensor, mask: Tensor | None = None, told: Any = None) -> Any:
        return super().forward(hidden, mask), told


def attending(told: Any = None) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(Attending(told), nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 2)).eval()


def test_an_input_by_keyword_and_none_for_what_is_not_asked(data: list[Tensor]) -> None:
    several, original = [x.double() for x in data], attending().double()
    gated = linearize.convert(original, several[0])
    whole = next(w for w in wholes_of(gated, several[0], groups_of(gated)) if w.path == "0.mixer")
    assert (whole.keyword, whole.nones, whole.alone) == ("hidden", 1, False)
    observe_wholes(gated, several, [whole])
    assert whole.sensitivity is not None
    fit = fit_whole(whole)
    assert fit is not None
    first, x = original[0], several[0]
    mixed = first.first(x)  # type: ignore[operator]
    expected = original[1:](first.last(mixed + mixed @ fit.weight.t() + fit.bias))  # type: ignore[operator]
    replace_wholes(gated, [(whole, fit)])
    torch.testing.assert_close(gated(x), expected, rtol=0, atol=1e-12)
    assert found_in(attending(), data[0]) == ["0", "0.mixer"]
    assert found_in(attending(torch.ones(1)), data[0]) == ["0"]  # a tensor behind


def test_a_map_that_is_told_of_a_cache_refuses(data: list[Tensor]) -> None:
    layer = OnlyLinear(8, 8, keyword="x", nones=2)
    x = data[0]
    expected = layer(x, None, (x, x), scale=1.0)
    assert expected[1:] == (None, None)
    assert torch.equal(layer(mask=None, x=x)[0], expected[0])
    with pytest.raises(UsageError, match=r"told no object .* use_cache=False"):
        layer(x, cache=object())


@pytest.mark.parametrize("kind", ["CLIPVision", "DistilBert"])
def test_attention_of_transformers_saved_and_loaded(kind: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    more: dict[str, dict[str, Any]] = {
        "CLIPVision": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64,
                       "image_size": 16, "patch_size": 4},
        "DistilBert": {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64, "vocab_size": 99},
    }  # fmt: skip
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**more[kind])
    model = getattr(transformers, f"{kind}Model")(config).eval()
    text = {"input_ids": torch.randint(1, 99, (2, 12))}
    batch = {"pixel_values": torch.randn(2, 3, 16, 16)} if kind == "CLIPVision" else text
    gated = linearize.convert(model, batch)
    found = [w for w in wholes_of(gated, batch, groups_of(gated)) if w.path.endswith(("self_attn", "attention"))]
    assert [(w.nones, w.keyword) for w in found] == [(1, "hidden_states" if kind == "CLIPVision" else "")] * 2
    observe_wholes(gated, [batch], found)
    replace_wholes(gated, [(whole, fit_whole(whole)) for whole in found])  # type: ignore[misc]
    small = linearize.collapse(gated)
    expected = small(**batch)[0]
    torch.testing.assert_close(gated(**batch)[0], expected, rtol=0, atol=1e-5)
    assert (model(**batch)[0] - expected).abs().max() > 1e-4  # another function: this is approximate
    linearize.save(small, tmp_path / "m.safetensors")
    loaded = linearize.load(tmp_path / "m.safetensors")
    assert_same_tensors(small, loaded)
    assert_same_outputs(small, loaded, lambda each: [each(**batch)[0]])


def test_the_users_choice_of_sites_counts_for_modules(data: list[Tensor]) -> None:
    assert found_in(network(1.0, 1.0), data[0], exclude="1.*") == ["2"]
    assert found_in(network(1.0, 1.0), data[0], include="2.*") == ["2"]


@pytest.mark.parametrize("kind", ["Bert", "GPT2", "Llama", "ViT"])
def test_models_of_transformers(kind: str) -> None:
    transformers = pytest.importorskip("transformers")
    sizes: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    more: dict[str, dict[str, Any]] = {
        "Bert": {"intermediate_size": 64, "vocab_size": 99},
        "GPT2": {"vocab_size": 99, "bos_token_id": 0, "eos_token_id": 0},
        "Llama": {"intermediate_size": 64, "vocab_size": 99, "use_cache": False},
        "ViT": {"intermediate_size": 64, "image_size": 16, "patch_size": 4},
    }
    head = {"Bert": "Model", "GPT2": "LMHeadModel", "Llama": "ForCausalLM", "ViT": "Model"}[kind]
    config = getattr(transformers, f"{kind}Config")(**sizes, **more[kind])
    model = getattr(transformers, f"{kind}{head}")(config).eval()
    mask = (torch.arange(12) < torch.tensor([[12], [9]])).long()
    text = {"input_ids": torch.randint(1, 99, (2, 12)), "attention_mask": mask}
    batch = {"pixel_values": torch.randn(2, 3, 16, 16)} if kind == "ViT" else text
    gated = linearize.convert(model, batch)
    found = wholes_of(gated, batch, groups_of(gated))
    if kind in ("GPT2", "Llama"):  # a cache may come with the next call
        assert not found
        return
    layers = [whole for whole in found if whole.path.split(".")[-1].isdigit()]
    assert len(layers) == 2
    assert all(len(whole.sites) == 1 and whole.inputs == 32 for whole in layers)
    observe_wholes(gated, [batch], found)
    assert [whole.rows and whole.rows.count for whole in layers] == [34 if kind == "ViT" else 21] * 2  # without padding
    replace_wholes(gated, [(layers[1], fit_whole(layers[1]))])  # type: ignore[list-item]
    assert gated(**batch)[0].isfinite().all()
    assert len(gates(gated)) == 2  # the first layer's, and the pooler's


# What stands for them


def fitted(whole: Whole) -> tuple[Whole, WholeFit]:
    fit = fit_whole(whole)
    assert fit is not None
    return whole, fit


def observed(model: nn.Module, data: list[Tensor]) -> tuple[nn.Module, dict[str, Any]]:
    gated = linearize.convert(model, data[0])
    wholes = wholes_of(gated, data[0], groups_of(gated))
    observe_wholes(gated, data, wholes)
    return gated, {whole.path: whole for whole in wholes}


def test_the_map_is_that_of_least_squares(data: list[Tensor]) -> None:
    model = network(1.0).double()
    several = [x.double() for x in data]
    _, wholes = observed(model, several)
    x = torch.cat([model[0](x).flatten(0, 1) for x in several])
    y = torch.cat([model[1](model[0](x)).flatten(0, 1) for x in several])
    ones = torch.cat((x, torch.ones_like(x[:, :1])), 1)
    wanted = torch.linalg.lstsq(ones, y).solution.t()
    fit = fit_whole(wholes["1"], ridge=0.0)
    assert fit is not None
    torch.testing.assert_close(fit.weight, wanted[:, :-1], rtol=0, atol=1e-5)  # a ridge of 1e-8 is left
    torch.testing.assert_close(fit.bias, wanted[:, -1], rtol=0, atol=1e-5)


def test_a_linear_module_is_replaced_exactly_and_another_is_not(data: list[Tensor]) -> None:
    model = network(0.0, 1.0).double()
    several = [x.double() for x in data]
    gated, wholes = observed(model, several)
    before = gated(several[0])
    replace_wholes(gated, [fitted(wholes["1"])])
    torch.testing.assert_close(gated(several[0]), before, rtol=0, atol=1e-12)
    assert list(gates(gated)) == ["2.mlp.1"]
    replace_wholes(gated, [fitted(wholes["2"])])
    assert (gated(several[0]) - before).abs().max() > 1e-3


def test_maps_that_follow_each_other_become_one(data: list[Tensor]) -> None:
    several = [x.double() for x in data]

    def maps_of(model: nn.Module) -> tuple[Any, dict[str, Any], Tensor]:
        """The gated model with all layers replaced, and what they give one by one."""
        gated, wholes = observed(model, several)
        layers = [path for path in wholes if path.isdigit()]
        x = gated[0](several[0])  # type: ignore[index]
        for path in layers:
            _, fit = fitted(wholes[path])
            x = x @ fit.weight.t() + fit.bias
        replace_wholes(gated, [fitted(wholes[path]) for path in layers])
        return gated, wholes, x

    gated, wholes, expected = maps_of(network(1.0, 1.0, 1.0).double())
    assert [wholes[path].behind for path in ("1", "2", "3")] == ["0", "1", "2"]
    assert [type(gated[place]) for place in (1, 2, 3)] == [nn.Linear, nn.Identity, nn.Identity]
    torch.testing.assert_close(gated[1](gated[0](several[0])), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(gated(several[0]), gated[5](gated[4](expected)), rtol=0, atol=1e-12)

    class Tapped(nn.Sequential):
        """What lies between its layers is wanted elsewhere."""

        def forward(self, x: Tensor) -> Tensor:
            first = self[1](self[0](x))
            return self[4](self[3](self[2](first) + first))

    tapped, wholes, _ = maps_of(Tapped(*network(1.0, 1.0)).double())
    assert [wholes[path].behind for path in ("1", "2")] == ["", ""]
    assert [type(tapped[place]) for place in (1, 2)] == [nn.Linear, nn.Linear]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.slow
def test_replaced_is_collapsed_is_saved_is_loaded_in_a_new_process(
    data: list[Tensor], tmp_path: Path, dtype: torch.dtype
) -> None:
    timm = pytest.importorskip("timm")
    images = [torch.randn(4, 3, 32, 32, dtype=dtype) for _ in range(2)]
    model = timm.create_model("test_vit", num_classes=5, img_size=32).to(dtype).eval()
    gated, wholes = observed(model, images)
    path = "blocks.1.attn"  # called with more than one argument
    replace_wholes(gated, [fitted(wholes[path])])
    replace_wholes(gated, [fitted(wholes["blocks.0"])])
    for gate in gates(gated).values():
        gate.slope.normal_()
        gate.linearize_(torch.rand(gate.channels) < 0.5)
    small = linearize.collapse(gated)
    with torch.no_grad():
        expected = small(images[0])
        error = (gated(images[0]) - expected).abs().max() / expected.abs().max()
    assert error < (1e-5 if dtype == torch.float32 else 1e-12)
    with torch.no_grad():
        torch.save((images[0], moved(small)(images[0])), tmp_path / "expected.pt")
    linearize.save(small, tmp_path / "m.safetensors")
    code = (
        "import sys, torch, linearize; from tests.processors import moved, other_sums;"
        "same = other_sums(); same.__enter__();"
        "x, y = torch.load(sys.argv[2]); m = linearize.load(sys.argv[1]);"
        "assert torch.equal(moved(m)(x), y); print(*(type(x).__name__ for x in (m, m.blocks[0], m.blocks[1].attn)))"
    )
    files = [str(tmp_path / "m.safetensors"), str(tmp_path / "expected.pt")]
    done = subprocess.run([sys.executable, "-c", code, *files], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["VisionTransformer", "Linear", "OnlyLinear"]


def test_what_a_pass_found_comes_back_from_plain_values(data: list[Tensor]) -> None:
    gated, wholes = observed(network(1.0), data)
    for whole in wholes_of(gated, data[0], groups_of(gated)):
        whole.restore(wholes[whole.path].state(), torch.device("cpu"))
        fit, known = fit_whole(whole), fit_whole(wholes[whole.path])
        assert fit is not None
        assert known is not None
        assert torch.equal(fit.weight, known.weight)
        assert fit.loss == known.loss


def test_losses_are_measured_and_the_model_left_as_it_was(data: list[Tensor]) -> None:
    model = network(1.0, 1.0)
    places = dict(model.named_modules())
    state = {name: value.clone() for name, value in model.state_dict().items()}
    layers = {"1": nn.Identity(), "2": model[2], "3": nn.Linear(1, 1)}
    found = losses_with(model, layers, data[:2])
    assert found["1"] > 0
    assert found["2"] == pytest.approx(0, abs=1e-6)
    assert found["3"] == float("inf")  # it cannot run
    assert dict(model.named_modules()) == places
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


# The choice


def tree(seed: int) -> list[Group]:
    """Two sites in a module, one of them in a module inside of that, and a site outside."""
    generator = torch.Generator().manual_seed(seed)

    def numbers(count: int) -> list[tuple[float, float]]:
        return [(float(v), float(c)) for v, c in torch.rand(count, 2, generator=generator).mul(50).round()]

    def group(name: str, inside: str, *pairs: tuple[float, float], module: bool = False) -> Group:
        choices = [SiteChoice(name, 0, i, WHOLE_MODULE if module and i else "factored") for i in range(len(pairs))]
        options = tuple(Option((c,), v, p, p, p, p) for c, (v, p) in zip(choices, pairs, strict=True))
        return Group((name,), options, inside=inside, gone_form=WHOLE_MODULE, encloses=module)

    return [
        group("a", "m", (0.0, 60.0), *numbers(3)),
        group("b", "n", (0.0, 60.0), *numbers(3)),
        group("c", "", (0.0, 60.0), *numbers(3)),
        group("m", "", (0.0, 30.0), *numbers(1), module=True),
        group("n", "m", (0.0, 20.0), *numbers(1), module=True),
    ]


def everything(groups: list[Group]) -> list[tuple[Option, ...]]:
    a, b, c, m, n = groups
    inner = [(bb, n.stay) for bb in b.options] + [(b.gone, n.options[1])]
    outer = [(aa, bb, m.stay, nn_) for aa in a.options for bb, nn_ in inner] + [(a.gone, b.gone, m.options[1], n.gone)]
    return [(aa, bb, cc, mm, nn_) for (aa, bb, mm, nn_), cc in itertools.product(outer, c.options)]


@pytest.mark.parametrize("seed", range(20))
def test_the_choice_among_modules_and_sites_is_the_best_of_all(seed: int) -> None:
    groups = tree(seed)
    for budget in (5.0, 20.0, 60.0, 120.0, 200.0):
        losses = [sum(o.loss for o in some) for some in everything(groups) if sum(o.flops for o in some) <= budget]
        found = choose(groups, "flops", budget)
        assert found.reachable is bool(losses)
        least = min(sum(o.flops for o in some) for some in everything(groups))
        assert found.cost == least if not losses else found.loss == min(losses)
        assert len(found.options) == len(groups)
        assert tuple(found.options) in everything(groups)


def test_costs_of_a_module_and_of_what_is_inside_add_up(data: list[Tensor]) -> None:
    model = network(1.0, 0.1)
    gated = linearize.convert(model, data[0])
    found = survey(model, gated, data, data[0], Wanted("flops"), progress=False)
    modules = {group.sites[0]: group for group in found.groups if group.encloses}
    assert {"2", "2.mixer"} <= set(modules)
    inside = [group for group in found.groups if group.inside == "2"]
    whole = next(w for p, w in found.places["modules"].items() if p == "2")
    assert modules["2"].stay.flops + sum(g.stay.flops for g in inside) == whole.flops
    assert modules["2"].stay.params + sum(g.stay.params for g in inside) == whole.params
    assert 0 <= found.fixed < found.total
    timed = [replace(g, options=tuple(replace(o, latency=0.01) for o in g.options)) for g in found.groups]
    layers = found.layers
    timed = with_enclosing_latencies(model, timed, layers, {"2": {16: 0.5}}, batch=16, rounds=2)
    assert all(option.cost("latency") >= 0 for group in timed for option in group.options)


def test_shares_are_measured_inside_the_model() -> None:
    slow, fast = nn.Sequential(nn.Linear(8, 2048), nn.Linear(2048, 8)), nn.Linear(8, 8)
    model = nn.Sequential(slow, fast, nn.ReLU())
    parts = {"slow": ["0"], "fast": ["1"], "inner": ["0.0", "0.1"], "both": ["0", "1"]}
    found = shares_in_place(model, torch.randn(64, 8), [64, 128], parts, rounds=5)
    for size in (64, 128):
        assert found["fast"][size] < found["inner"][size] <= found["slow"][size] < found["both"][size] <= 1
        assert found["slow"][size] > 0.5
    twice = nn.Sequential(slow, fast, fast)
    assert shares_in_place(twice, torch.randn(4, 8), [4], {"fast": ["1"], "slow": ["0"]}, rounds=1)["fast"] == {}
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


# From end to end


@pytest.mark.slow
def test_compress_takes_the_modules_that_do_little(data: list[Tensor], tmp_path: Path) -> None:
    model = network(1.0, 0.01, 1.0)
    result: Any = compress(model, data, flops=0.5, **QUIET)
    assert type(result.model[2]) is nn.Linear
    assert result.report.outcome is not None
    assert result.report.outcome.met
    assert result.report.after.flops <= 0.5 * result.report.before.flops
    forms = {site.site: site.form for site in result.plan.sites}
    assert forms["2"] == forms["2.mlp.1"] == WHOLE_MODULE
    sites_only = compress(model, data, flops=0.5, modules=False, **QUIET)
    assert WHOLE_MODULE not in {site.form for site in sites_only.plan.sites}

    def distance(small: nn.Module) -> float:
        with torch.no_grad():
            return float(sum((small(x) - model(x)).square().sum() for x in data))

    assert distance(result.model) < distance(sites_only.model)
    again = compress(model, data, plan=linearize.Plan.from_json(result.plan.to_json()), **QUIET)
    with torch.no_grad():
        assert torch.equal(again.model(data[0]), result.model(data[0]))
    linearize.save(result.model, tmp_path / "m.safetensors")
    loaded = linearize.load(tmp_path / "m.safetensors", model=network(1.0, 0.01, 1.0))
    assert_same_tensors(result.model, loaded)
    assert_same_outputs(result.model, loaded, lambda each: [each(data[0])])


@pytest.mark.parametrize("options", [{"sequential": True}, {"finetune": {"epochs": 1, "gradual": 0.5}}])
def test_modules_go_together_with_refits_and_training(data: list[Tensor], options: dict[str, Any]) -> None:
    model = network(1.0, 0.01)
    pairs = [(x, model(x).argmax(1).detach()) for x in data]
    result: Any = compress(model, pairs, flops=0.5, **options, **QUIET)
    assert type(result.model[2]) is nn.Linear
    assert result.report.verification


def test_a_plan_for_modules_of_another_model_is_refused(data: list[Tensor]) -> None:
    plan = compress(network(1.0, 0.01, 1.0), data, flops=0.6, **QUIET).plan
    with pytest.raises(linearize.UsageError, match="is in the plan, but not in the model"):
        compress(nn.Sequential(nn.Linear(8, 9), nn.ReLU(), nn.Linear(9, 3)), data, plan=plan, **QUIET)


@pytest.mark.slow
def test_equal_widths_and_plain_layers_leave_modules_alone(data: list[Tensor]) -> None:
    some: list[dict[str, Any]] = [{"uniform": True}, {"stock": True}, {"modules": False}]
    for options in some:
        plan = compress(network(1.0, 0.01), data, flops=0.8, **options, **QUIET).plan
        assert WHOLE_MODULE not in {site.form for site in plan.sites}
