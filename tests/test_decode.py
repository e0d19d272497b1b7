"""Budgets of models that generate: memory, tokens per second, time to the first token, and several at once."""

from __future__ import annotations

import copy
import itertools
import json
import random
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import linearize
from linearize.cli import run
from linearize.errors import UsageError
from linearize.families.option import Group, Measure, Option, SiteChoice
from linearize.planning.budget import Budget, read_budgets
from linearize.planning.decision import Decision
from linearize.planning.request import Request
from linearize.planning.several import choose_within
from linearize.report.budget import Outcome
from linearize.running.models import evaluating
from linearize.serving.decoder import Decoder
from linearize.serving.memory import memory, weight_bytes
from linearize.serving.point import Point, read_point
from linearize.zoo.caches import bytes_by_layer, cache_in, keepers
from tests.toys import QUIET

transformers = pytest.importorskip("transformers")

POINT = Point(2, 48)
SERVED: dict[str, Any] = {**QUIET, "search": 0, "serving": (2, 48)}


@cache
def made(kind: str = "llama") -> Any:
    """A tiny decoder; nobody changes it."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "max_position_embeddings": 64,
    }  # fmt: skip
    if kind == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=96, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=0
        )
        return transformers.GPT2LMHeadModel(config).eval()
    if kind == "mistral":
        config = transformers.MistralConfig(num_key_value_heads=2, sliding_window=8, **sizes)
        return transformers.MistralForCausalLM(config).eval()
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(num_key_value_heads=2, **sizes)).eval()


def batches(count: int = 4) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [{"input_ids": torch.randint(96, (4, 16), generator=generator)} for _ in range(count)]


def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that counts operations: what it measures is the same on every machine, however busy."""

    def seconds(call: Callable[[], Any], _: torch.device) -> float:
        with FlopCounterMode(display=False) as counter:
            call()
        return float(counter.get_total_flops())

    def layers(runs: dict[str, Callable[[], Any]], x: Tensor, *_: Any) -> dict[str, Tensor]:
        return {name: torch.tensor([max(seconds(run, x.device), 1.0)]) for name, run in runs.items()}

    monkeypatch.setattr("linearize.serving.decoder.decode_seconds", seconds)
    monkeypatch.setattr("linearize.planning.timing.layers.seconds_of", layers)
    monkeypatch.setattr("linearize.bench._SHORTEST", 1e-5)


# Steps of generation


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mistral"])
def test_steps_with_the_cache_give_what_the_whole_text_gives(kind: str) -> None:
    model = made(kind)
    with evaluating(model):
        decoder = Decoder(model, POINT)
        kept = decoder.fresh()
        steps = torch.stack([decoder.step(kept, index).logits[:, -1] for index in range(decoder.steps)], 1)
        ids = torch.cat([decoder.prompt, decoder.rest], 1)
        whole = model(input_ids=ids).logits[:, -decoder.steps :]
        other = model(input_ids=decoder.rest).logits  # as if there had been no prompt
    assert ids.shape == (2, 48)
    assert float((steps - whole).abs().max()) < 1e-5
    assert float((other - whole).abs().max()) > 1e-3
    assert len(decoder.seconds_of_steps()) == decoder.steps


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mistral"])
def test_memory_is_what_the_tensors_take(kind: str) -> None:
    model = made(kind)
    found = memory(model, POINT)
    with evaluating(model):
        real = cache_in(model(input_ids=torch.zeros(2, 48, dtype=torch.long), use_cache=True))
    assert list(found.layers) == bytes_by_layer(real)
    tensors = {t.data_ptr(): t.nbytes for t in (*model.parameters(), *model.buffers()) if t.numel()}
    assert found.weights == weight_bytes(model) == sum(tensors.values())
    if kind == "llama":  # keys and values, heads, width, batch, tokens, bytes
        assert list(found.layers) == [2 * 2 * 8 * 2 * 48 * 4] * 2
    if kind == "mistral":
        assert found.cache < memory(made(), POINT).cache / 4  # a window needs no more than itself
    assert memory(model, Point(4, 48)).cache == pytest.approx(2 * found.cache, rel=0.01)
    assert all(isinstance(number, int) for number in keepers(model).values())


# Several budgets


def test_choices_within_several_limits_keep_them_and_are_close_to_the_best() -> None:
    rng = random.Random(0)  # noqa: S311 - not for secrets
    optimal = reachable = 0
    for _ in range(60):
        measures: list[Measure] = ["flops", "params", "activations"][: rng.choice([2, 2, 3])]  # type: ignore[assignment]
        groups = []
        for name in "abcde"[: rng.randint(2, 4)]:
            rows: list[Any] = [(0.0, 10.0, 10.0, 10.0)]
            rows += [(rng.random(), *(rng.uniform(0, 10) for _ in range(3))) for _ in range(rng.randint(1, 4))]
            groups.append(Group((name,), tuple(Option((SiteChoice(name, i),), *row) for i, row in enumerate(rows))))
        limits = {measure: rng.uniform(0.3, 0.9) * 10 * len(groups) for measure in measures}

        def keeps(options: tuple[Option, ...], limits: dict[Measure, float] = limits) -> bool:
            return all(sum(o.cost(m) for o in options) <= limit * (1 + 1e-9) for m, limit in limits.items())

        every = [some for some in itertools.product(*(group.options for group in groups)) if keeps(some)]
        found = choose_within(groups, limits)
        assert found.reachable == keeps(found.options)
        assert found.loss == pytest.approx(sum(option.loss for option in found.options))
        assert all(option in group.options for option, group in zip(found.options, groups, strict=True))
        if every:
            best = min(sum(option.loss for option in some) for some in every)
            reachable += 1
            assert found.reachable
            assert found.loss <= 1.25 * best + 1e-9
            optimal += found.loss <= best + 1e-9
    assert reachable > 30
    assert optimal >= 0.9 * reachable


def test_limits_that_cannot_be_kept_give_what_exceeds_them_least() -> None:
    options = (Option((SiteChoice("a", 2),), 0, 10, 10, 0), Option((SiteChoice("a", 1),), 1, 6, 9, 0))
    found = choose_within([Group(("a",), options)], {"flops": 5, "params": 5})
    assert not found.reachable
    assert found.options == options[1:]
    assert found.cost == pytest.approx(9 / 5)
    assert not choose_within([Group(("a",), options)], {"flops": -1, "params": 20}).reachable


# To a budget


@pytest.mark.slow
def test_a_budget_in_memory_is_met_to_the_byte() -> None:
    model = made()
    before = copy.deepcopy(model.state_dict())
    result = linearize.compress(model, batches(), memory=0.7, families=["channels", "heads"], **SERVED)
    outcome = result.report.outcome
    assert outcome is not None
    assert outcome.met is True
    small: Any = result.model
    assert outcome.reached == memory(small, POINT).total / memory(model, POINT).total
    assert outcome.reached <= 0.7
    assert outcome.predicted == pytest.approx(outcome.reached, abs=0.01)
    assert outcome.at == "batch 2, context 48"
    assert "weights and cache" in str(result.report)
    assert small.generate(torch.tensor([[3, 4, 5]]), min_new_tokens=3, max_new_tokens=3, do_sample=False).shape == (
        1,
        6,
    )
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.slow
def test_where_the_cache_is_most_of_the_memory_heads_or_attention_go() -> None:
    """With a hundred texts at a time the weights hardly count: only what shortens the cache meets the budget."""
    model = made()
    result = linearize.compress(
        model, batches(), memory=0.6, families=["channels", "heads", "attention"], **{**SERVED, "serving": (100, 64)}
    )
    assert result.report.outcome is not None
    assert result.report.outcome.met is True
    assert {"fewer heads", "attention gone"} & {site.form for site in result.plan.sites}
    point = Point(100, 64)
    assert memory(result.model, point).cache < 0.7 * memory(model, point).cache


@pytest.mark.parametrize("budget", [{"decode": 1.1}, pytest.param({"prefill": 0.9}, marks=pytest.mark.slow)])
def test_a_budget_in_time_is_measured_with_the_real_cache(
    budget: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock(monkeypatch)
    model = made()
    result = linearize.compress(model, batches(), families=["channels"], **budget, **SERVED)
    outcome = result.report.outcome
    assert outcome is not None
    assert outcome.met is True
    assert outcome.reached is not None
    assert outcome.reached <= outcome.asked * 1.02
    with evaluating(model, result.model):
        two = [Decoder(one, POINT) for one in (result.model, model)]
        kind = "seconds_of_prefill" if "prefill" in budget else "seconds_of_steps"
        new, old = (getattr(decoder, kind)() for decoder in two)
    new, old = (sum(v) if isinstance(v, list) else v for v in (new, old))
    assert new / old == pytest.approx(outcome.reached, rel=0.01)
    assert ("x as fast" in str(outcome)) == ("decode" in budget)


@pytest.mark.slow
def test_several_budgets_are_all_met(monkeypatch: pytest.MonkeyPatch) -> None:
    clock(monkeypatch)
    model = made()
    result = linearize.compress(
        model, batches(), decode=1.2, memory=0.75, families=["channels", "heads"], **{**SERVED, "search": 1}
    )
    outcome = result.report.outcome
    assert outcome is not None
    assert outcome.measure == "together"
    assert outcome.met is True
    by_measure = {part.measure: part for part in outcome.parts}
    assert set(by_measure) == {"decode", "memory"}
    assert by_measure["memory"].reached == memory(result.model, POINT).total / memory(model, POINT).total
    assert all(part.met for part in outcome.parts)
    assert outcome.reached == max(part.reached / part.asked for part in outcome.parts if part.reached is not None)
    told = json.loads(json.dumps(result.report.to_dict()))["budget"]
    assert [part["measure"] for part in told["parts"]] == ["memory", "decode"]


def test_of_several_budgets_one_that_is_out_of_reach_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    clock(monkeypatch)
    result = linearize.compress(made(), batches(), flops=0.9, memory=0.05, families=["channels"], **SERVED)
    outcome = result.report.outcome
    assert outcome is not None
    assert outcome.met is False
    told = {part.measure: part.met for part in outcome.parts}
    assert told == {"flops": True, "memory": False}
    assert str(result.report).count("NOT MET") == 1


@pytest.mark.slow
def test_a_dry_run_predicts_every_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    clock(monkeypatch)
    found = linearize.compress(
        made(), batches(2), decode=1.2, prefill=0.9, memory=0.8, families=["channels"], dry_run=True, **SERVED
    )
    outcome = found.report.outcome
    assert outcome is not None
    assert [part.met for part in outcome.parts] == [None] * 3
    assert outcome.parts[0].measure == "memory"
    assert 0 < outcome.parts[0].predicted <= 0.8
    assert all(0 < part.least <= part.predicted <= 1.01 for part in outcome.parts)
    assert "bytes served" in next(iter(found.report.options.values()))


def test_a_decision_keeps_its_outcomes(tmp_path: Path) -> None:
    parts = tuple(Outcome(name, 0.7, 0.6, 0.65, 0.2, 0.1, None, True, at="batch 1, context 9") for name in ("a", "b"))
    whole = Outcome("together", 1.0, 0.9, 0.95, 0.3, 0.1, None, True, parts=parts)
    from linearize.plan import Plan

    decision = Decision(Plan(()), (), whole, {}, ())
    decision.write(tmp_path / "plan.json", "key")
    found = Decision.read(tmp_path / "plan.json", "key")
    assert found is not None
    assert found.outcome == whole


# What cannot be asked


@pytest.mark.parametrize(
    ("budgets", "found"),
    [
        ({"latency": 0.5, "speedup": 2}, "2 budgets for the latency"),
        ({"activations": 0.5, "flops": 0.5}, "activations= by itself"),
        ({"decode": 0.9}, "decode"),
        ({"decode": float("nan")}, "decode"),
        ({"prefill": 1.5}, "prefill"),
        ({"prefill": 0}, "prefill"),
        ({"memory": 0}, "memory"),
        ({"memory": "half"}, "memory"),
        ({"memory": 0.5, "linear": 0.5}, "beside linear="),
        ({"flops": 0.5, "serving": (1, 64)}, "serving"),
        ({"memory": 0.5, "serving": (1,)}, "serving"),
        ({"memory": 0.5, "serving": (1, 2)}, "at least 4 tokens"),
        ({"memory": 0.5, "serving": "1,64"}, "serving"),
    ],
)
def test_budgets_that_make_no_sense_are_refused(budgets: dict[str, Any], found: str) -> None:
    with pytest.raises(UsageError, match=found):
        Request(**budgets)


def test_budgets_are_read_in_one_order() -> None:
    assert read_budgets(decode=2, flops=0.5) == (Budget("flops", 0.5), Budget("decode", 0.5))
    assert read_point([8, 1024]) == Point(8, 1024)
    assert Request(memory=0.5).point(16) == Point(1, 16)
    assert Request(flops=0.5).point(16) is None


def encoder() -> nn.Module:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    return transformers.BertModel(transformers.BertConfig(vocab_size=96, **sizes)).eval()


def translator() -> nn.Module:
    config = transformers.T5Config(vocab_size=96, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    return transformers.T5ForConditionalGeneration(config).eval()


@pytest.mark.parametrize(
    ("model", "options", "found"),
    [
        (encoder, {"decode": 1.5}, "does not generate text"),
        (lambda: nn.Sequential(nn.Embedding(96, 8), nn.Linear(8, 8)), {"memory": 0.5}, "does not generate text"),
        (translator, {"prefill": 0.5}, "what an encoder gives"),
        (made, {"decode": 1.5, "serving": (1, 65)}, "made for 64 tokens"),
    ],
)
def test_models_that_cannot_be_served_so_are_refused(
    model: Callable[[], nn.Module], options: dict[str, Any], found: str
) -> None:
    data: list[Any] = batches(1)
    network = model()
    if isinstance(network, nn.Sequential):
        data = [batch["input_ids"] for batch in data]
    if getattr(getattr(network, "config", None), "is_encoder_decoder", False):
        data = [{**batch, "decoder_input_ids": batch["input_ids"]} for batch in data]
    with pytest.raises(UsageError, match=found):
        linearize.compress(network, data, progress=False, **options)


@pytest.mark.slow
def test_the_command_takes_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made().save_pretrained(tmp_path / "model")
    (tmp_path / "a.txt").write_text("abc def ghi. " * 300, encoding="utf-8")
    letters = tmp_path / "tokenizer.json"
    tokenizers = pytest.importorskip("tokenizers")
    known = {chr(code): index for index, code in enumerate(range(32, 128))}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(known, " "))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    tokenizer.save(str(letters))
    capsys.readouterr()
    arguments = ["compress", f"hf:{tmp_path / 'model'}", "--data", str(tmp_path / "a.txt"), "--tokenizer", str(letters)]
    arguments += ["--context", "16", "--memory", "0.8", "--params", "0.9", "--dry-run", "--search", "0"]
    arguments += ["--family", "channels"]
    assert run([*arguments, "--serving", "2,48", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [part["measure"] for part in told["budget"]["parts"]] == ["params", "memory"]
    assert told["budget"]["parts"][1]["at"] == "batch 2, context 48"
    assert run([*arguments, "--serving", "2x48"]) == 2
    assert "--serving" in capsys.readouterr().err


# Side by side


def test_models_generate_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from linearize.serving.bench import benchmark_generation

    small = copy.deepcopy(made())
    small.model.layers = small.model.layers[:1]
    result = benchmark_generation(
        {"original": made(), "small": small}, prompts=[8, 16], new_tokens=4, batch_sizes=[2], rounds=2
    )
    assert [(row.model, row.batch_size, row.prompt) for row in result.rows] == [
        ("original", 2, 8), ("small", 2, 8), ("original", 2, 16), ("small", 2, 16)
    ]  # fmt: skip
    first, other = result.rows[:2]
    assert (first.first_ratio, first.between_ratio) == (None, None)
    assert other.first_ratio is not None
    assert other.first_ratio > 0
    assert 0 < first.between_p50 <= first.between_p95
    assert first.tokens_per_second <= 2 / min(first.between_p50, first.between_p95) * 4
    assert (first.weights, first.cache) == (weight_bytes(made()), memory(made(), Point(2, 12)).cache)
    assert other.cache * 2 == first.cache
    assert "tokens/s" in str(result)
    result.save(tmp_path / "result.json")
    assert json.loads((tmp_path / "result.json").read_text())["rows"][0]["prompt"] == 8


def test_the_command_generates(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made().save_pretrained(tmp_path / "model")
    spec = f"hf:{tmp_path / 'model'}"
    capsys.readouterr()
    arguments = ["bench", spec, spec, "--generate", "--batch-sizes", "1", "--rounds", "1", "--new-tokens", "2"]
    assert run([*arguments, "--prompts", "8", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["model"] for row in rows] == ["A", "B"]
    for options, found in {
        ("--prompts", "x"): "--prompts",
        ("--prompts", "63"): "made for 64 tokens",
        ("--prompts", "8", "--compile", "yes"): "--compile",
    }.items():
        assert run([*arguments, *options]) == 2
        assert found in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"prompts": [0]}, "prompts"),
        ({"new_tokens": 0}, "new_tokens"),
        ({"rounds": 0}, "rounds"),
        ({"prompts": [64]}, "made for 64 tokens"),
    ],
)
def test_what_cannot_be_generated_is_refused(options: dict[str, Any], found: str) -> None:
    from linearize.serving.bench import benchmark_generation

    with pytest.raises(UsageError, match=found):
        benchmark_generation({"a": made()}, **options)
    with pytest.raises(UsageError, match="models"):
        benchmark_generation(made())


# Caches of before


@pytest.mark.slow
def test_a_cache_from_before_layers_went_is_refused(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = copy.deepcopy(made().config)
    config.num_hidden_layers = 4
    model = transformers.LlamaForCausalLM(config).eval()
    small: Any = linearize.compress(
        model, batches(2), flops=0.85, families=["depth"], rounds=0, search=0, progress=False, cache=False
    ).model
    assert small.config.num_hidden_layers < 4
    ids = batches(1)[0]["input_ids"]
    linearize.save(small, tmp_path / "small.safetensors")
    for one in (small, copy.deepcopy(small), linearize.load(tmp_path / "small.safetensors")):
        with torch.no_grad():
            old, new = cache_in(model(ids, use_cache=True)), cache_in(one(ids, use_cache=True))
            with pytest.raises(UsageError, match="start with a new cache"):
                Decoder(one, POINT).step(old, 0)
            assert Decoder(one, Point(4, 48)).step(new, 0).logits.shape == (4, 1, 96)
            assert one.generate(ids, min_new_tokens=2, max_new_tokens=2).shape == (4, 18)  # type: ignore[operator]


# Images with text


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*the covariance has no full rank")
@pytest.mark.parametrize(("kind", "name"), [("llava", "Llava"), ("qwen2_vl", "Qwen2VL")])
def test_batches_of_images_and_text_go_through_as_they_are(kind: str, name: str) -> None:
    from linearize.zoo import example_inputs
    from linearize.zoo.tiny import tiny_config

    torch.manual_seed(0)
    config = tiny_config(kind)
    if kind == "qwen2_vl":  # half of a head's width, for time, height and width
        config.get_text_config().rope_parameters["mrope_section"] = [2, 3, 3]
    model = getattr(transformers, f"{name}ForConditionalGeneration")(config).eval()
    _, kwargs = example_inputs(model, batch=2)
    assert {"input_ids", "pixel_values", "attention_mask"} <= set(kwargs)
    data = [{**kwargs, "pixel_values": torch.randn_like(kwargs["pixel_values"])} for _ in range(3)]
    told = [{name: value.clone() if isinstance(value, Tensor) else value for name, value in b.items()} for b in data]
    gated = linearize.convert(model, data[0])
    with torch.no_grad():
        assert torch.equal(gated(**data[0]).logits, model(**data[0]).logits)
    found = linearize.calibrate(gated, data, progress=False)
    assert any(".language_model." in f".{site}" and one.count for site, one in found.sites.items())
    assert any("vision" in site or "visual" in site for site in found.sites)
    result = linearize.compress(
        model, data, flops=0.9, families=["channels"], rounds=0, search=0, progress=False, cache=False
    )
    assert result.report.outcome is not None
    assert result.report.outcome.met is True
    with torch.no_grad():
        apart = (result.model(**data[0]).logits - model(**data[0]).logits).abs().max()
    assert 0 < float(apart) < 10
    for batch, before in zip(data, told, strict=True):
        assert batch.keys() == before.keys()
        assert all(torch.equal(v, before[n]) for n, v in batch.items() if isinstance(v, Tensor))


def test_scores_need_no_labels_and_leave_padding_out() -> None:
    """The distance is the divergence of the model's own scores, on tokens that count."""
    from linearize.training.distance import real_loss

    model = made()
    torch.manual_seed(5)
    other = transformers.LlamaForCausalLM(model.config).eval()
    ids = batches(1)[0]["input_ids"]
    mask = torch.ones_like(ids)
    mask[:, 10:] = 0
    with torch.no_grad():
        p, q = (one(input_ids=ids, attention_mask=mask).logits.double().log_softmax(-1) for one in (model, other))
    told = (p.exp() * (p - q)).sum(-1)
    assert real_loss(model, other, [{"input_ids": ids, "attention_mask": mask}]) == pytest.approx(
        float(told[:, :10].mean()), rel=1e-4
    )
    assert float(told[:, :10].mean()) != pytest.approx(float(told.mean()), rel=1e-4)
    labelled = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
    assert real_loss(model, other, [labelled]) == pytest.approx(float(told[:, :10].mean()), rel=1e-4)
