"""GGUF: Llama-like decoders in llama.cpp itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import linearize
from linearize import Plan
from linearize.compress import compress
from linearize.errors import ExportError, UsageError
from linearize.export.llamacpp import ask
from tests.decoders import biased, narrow, without_attention
from tests.exported import llama, off, small, transformer
from tests.toys import QUIET

pytest.importorskip("gguf")
pytest.importorskip("xllamacpp")
IDS = torch.randint(3, 60, (60, 10), generator=torch.Generator().manual_seed(1))


def fewer_heads() -> Any:
    """One layer with half of the heads, as if the others had been removed."""
    model = llama()
    attention = model.model.layers[1].self_attn
    attention.q_proj, attention.k_proj = nn.Linear(32, 16, bias=False), nn.Linear(32, 8, bias=False)
    attention.v_proj, attention.o_proj = nn.Linear(32, 8, bias=False), nn.Linear(16, 32, bias=False)
    return model


def empty_layer() -> Any:
    model = without_attention(llama(num_hidden_layers=3), 1, zero=True)
    model.model.layers[1].mlp = nn.Linear(32, 32, bias=False)
    nn.init.zeros_(model.model.layers[1].mlp.weight)
    return model


ROPE = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 16}  # fmt: skip
CASES: dict[str, tuple[Any, str]] = {
    "llama": (llama, "llama"),
    "llama tied, with biases": (
        lambda: biased(llama(mlp_bias=True, attention_bias=True, tie_word_embeddings=True)), "llama"),
    "llama 3": (lambda: llama(rope_parameters=ROPE), "llama"),
    "qwen 2": (lambda: biased(transformer("Qwen2ForCausalLM", "Qwen2Config", num_key_value_heads=2)), "qwen2"),
    "qwen 3": (lambda: transformer("Qwen3ForCausalLM", "Qwen3Config", num_key_value_heads=2, head_dim=8), "qwen3"),
    "per-layer widths": (lambda: narrow(llama(), 1, 64), "deci"),
    "qwen 2 with per-layer widths": (
        lambda: narrow(biased(transformer("Qwen2ForCausalLM", "Qwen2Config", num_key_value_heads=2)), 0, 32), "deci"),
    "per-layer heads": (fewer_heads, "deci"),
    "a matrix for attention": (lambda: without_attention(llama(), 0, zero=False), "deci"),
    "no attention": (lambda: without_attention(llama(), 1, zero=True), "deci"),
    "a layer that does nothing": (empty_layer, "llama"),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_in_llama_cpp(name: str, tmp_path: Path) -> None:
    """Logits to 1e-2 relative are asked for; in float32 throughout they are the same to rounding."""
    build, architecture = CASES[name]
    made = linearize.export(build(), tmp_path / "a.gguf", format="gguf")
    assert made.facts["architecture"] == architecture
    assert made.proof is not None
    assert made.proof.error <= 2e-5
    assert "picked greedily are those of the model" in made.proof.told


def test_greedy_tokens_against_generate(tmp_path: Path) -> None:
    """Our own look, by generate; another model's tokens and logits are the negative control."""
    model, other = llama(), llama(rms_norm_eps=1e-1)
    for each in (model, other):
        each.generation_config.eos_token_id = None
    linearize.export(model, tmp_path / "a.gguf", format="gguf")
    prompt = [5, 9, 30, 7]
    _, (steps,), _ = ask(tmp_path / "a.gguf", [prompt], new=12, most=64)
    found = [step[0] for step in steps]
    ids = torch.tensor([prompt])
    for each, same in ((model, True), (other, False)):
        said = each.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
        assert (said[0, 4:].tolist()[: len(found)] == found) is same
        logits = each(ids).logits[0, -1].log_softmax(-1)
        told = torch.tensor([value for _, value in sorted(steps[0][1])])
        assert (off(logits, told) < 1e-4) is same


@pytest.mark.slow
def test_what_compress_makes_with_skips_and_biases(tmp_path: Path) -> None:
    """Linear channels of a gated unit are ordinary ones whose gate is a constant."""
    model = llama(num_hidden_layers=3)
    data = [{"input_ids": IDS, "use_cache": False}] * 3
    plan = compress(model, data, flops=0.5, families=("channels",), **QUIET).plan
    few = Plan(tuple(site for site in plan.sites if site.form == "factored"))  # a skip of full rank fits no gguf
    found = compress(model, data, plan=few, families=("channels",), **QUIET).model
    assert any(type(module).__name__ == "OnesLinear" for module in found.modules())
    made = linearize.export(found, tmp_path / "a.gguf", format="gguf")
    assert made.facts["architecture"] == "deci"
    assert made.proof is not None
    assert made.proof.error <= 2e-5


def test_half_precision(tmp_path: Path) -> None:
    for kind in (torch.float16, torch.bfloat16):
        made = linearize.export(llama().to(kind), tmp_path / f"{kind}.gguf", format="gguf")
        assert made.proof is not None
        assert made.proof.error <= 2e-2
        assert made.size < 0.8 * 4 * sum(p.numel() for p in llama().parameters())


def test_refusals(tmp_path: Path) -> None:
    def refuse(model: nn.Module, match: str) -> None:
        with pytest.raises(ExportError, match=match):
            linearize.export(model, tmp_path / "a.gguf", format="gguf", example_inputs={"input_ids": IDS[:2]})

    refuse(small("llama")[1], r"layers.0.mlp.down_proj: is a CarryLinear.*gguf cannot hold that.*nearest.*\"remote\"")
    trap = llama()
    trap.model.layers[1].mlp = nn.Linear(32, 32, bias=False)
    refuse(trap, "layers.1.mlp: is one linear map, where an FFN")
    nn.init.zeros_(trap.model.layers[1].mlp.weight)
    refuse(trap, "layers.1.mlp: is gone while the attention before it is there")
    lifted = without_attention(llama(), 0, zero=False)
    lifted.model.layers[0].self_attn.linear.bias = nn.Parameter(torch.ones(32))
    refuse(lifted, "layers.0.self_attn: is one matrix with a bias")
    refuse(llama(hidden_act="gelu"), "layers.0.mlp.act_fn: is a .*, where SiLU is expected")
    refuse(transformer("GPTNeoXForCausalLM", "GPTNeoXConfig"), "is no causal language model of the kinds llama")
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 32}
    refuse(llama(rope_parameters=yarn), "config.rope_parameters: are of the type 'yarn'")
    third = transformer("Qwen3ForCausalLM", "Qwen3Config", num_key_value_heads=2, head_dim=8)
    refuse(narrow(third, 1, 64), "layers.1: differs from the first layer, and keys are normed")
    refuse(llama().double(), "has parameters of torch.float64")


def vocabulary(*, spaces: bool = False) -> Any:
    """A tokenizer of bytes, trained on a few lines."""
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=spaces)
    made.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<end>"], initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(["the cat sat on the mat", "it isn't what it's said to be", "x = [1, 2]"] * 3, trainer)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>")  # noqa: S106 - no secret


def test_a_tokenizer_makes_the_same_tokens_there(tmp_path: Path) -> None:
    known = vocabulary()
    model = llama(vocab_size=320)
    known.save_pretrained(tmp_path / "tokenizer")
    made = linearize.export(model, tmp_path / "a.gguf", format="gguf", tokenizer=tmp_path / "tokenizer")
    assert made.facts["vocabulary"] == f"{len(known)} tokens, split as gpt-2"
    text = "the mat isn't on 12 cats"
    _, _, (ids,) = ask(tmp_path / "a.gguf", [], new=0, most=0, text=[text])
    assert ids == known(text)["input_ids"]
    with pytest.raises(UsageError, match="tokenizer: it splits texts in a way that is not known here"):
        linearize.export(model, tmp_path / "b.gguf", format="gguf", tokenizer=vocabulary(spaces=True))
    with pytest.raises(UsageError, match="tokenizer: cannot read it"):
        linearize.export(model, tmp_path / "b.gguf", format="gguf", tokenizer=tmp_path)
    with pytest.raises(UsageError, match="tokenizer: found a int"):
        linearize.export(model, tmp_path / "b.gguf", format="gguf", tokenizer=3)


def test_a_file_that_llama_cpp_does_not_read(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(b"nothing")
    with pytest.raises(ExportError, match=r"llama.cpp cannot run it"):
        ask(tmp_path / "a.gguf", [[1]], new=1, most=1)


# Encoders


def encoder(**more: Any) -> Any:
    """With biases and norms that are not those of a new model."""
    model = transformer("BertModel", "BertConfig", **more)
    for name, parameter in model.named_parameters():
        if name.endswith(("bias", "LayerNorm.weight")):
            parameter.data.add_(torch.randn(parameter.shape) * 0.2)
    return model


@pytest.mark.parametrize("act", ["gelu", "gelu_pytorch_tanh"])
def test_an_encoder_gives_the_same_states(act: str, tmp_path: Path) -> None:
    model, other = encoder(hidden_act=act), encoder(layer_norm_eps=1e-1)
    made = linearize.export(model, tmp_path / "a.gguf", format="gguf")
    assert made.facts["architecture"] == "bert"
    assert made.proof is not None
    assert made.proof.error <= 1e-2  # what was asked for; the table of GELU has eleven bits
    ids = [5, 9, 30, 7]
    _, (states,), _ = ask(tmp_path / "a.gguf", [ids], states=True)
    found = torch.tensor(states)
    for each, same in ((model, True), (other, False)):
        assert (off(each(torch.tensor([ids])).last_hidden_state[0], found) < 1e-2) is same


@pytest.mark.slow
def test_an_encoder_that_became_narrower(tmp_path: Path) -> None:
    """Of equal widths, as `uniform=True` keeps them; of others, refused with the layer."""
    data = [{"input_ids": IDS}] * 3
    small_ = compress(encoder(), data, flops=0.7, target="gguf", uniform=True, families=("channels",), **QUIET).model
    made = linearize.export(small_, tmp_path / "a.gguf", format="gguf")
    assert made.facts["FFN widths"] < 96
    assert made.proof is not None
    assert made.proof.error <= 1e-2
    odd = encoder()
    odd.encoder.layer[1].intermediate.dense, odd.encoder.layer[1].output.dense = nn.Linear(32, 64), nn.Linear(64, 32)
    with pytest.raises(ExportError, match=r"layer.1.intermediate.dense: has width 64.*uniform=True.*gguf cannot hold"):
        linearize.export(odd, tmp_path / "b.gguf", format="gguf")
    with pytest.raises(ExportError, match=r"intermediate_act_fn: is a ReLU.*, where GELU is expected"):
        linearize.export(encoder(hidden_act="relu"), tmp_path / "b.gguf", format="gguf")
    with pytest.raises(ExportError, match=r"layer.0.*: is a CarryLinear, where a stock layer is expected"):
        linearize.export(small("bert")[1], tmp_path / "b.gguf", format="gguf")


def pieces(*, lower: bool) -> Any:
    tokenizers, transformers = pytest.importorskip("tokenizers"), pytest.importorskip("transformers")
    text = "[PAD] [UNK] [CLS] [SEP] [MASK] hello world it ' s ##s 12 ##34 ##5 o clock , isn t ? yes . gr ##u ##ße x = ["
    words = {word: i for i, word in enumerate([*text.split(), *"1 2 ] # done !".split()])}
    made = tokenizers.Tokenizer(tokenizers.models.WordPiece(words, unk_token="[UNK]"))  # noqa: S106 - no password
    made.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=lower)
    made.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    made.post_processor = tokenizers.processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    names = {f"{role}_token": f"[{role.upper()}]" for role in ("pad", "unk", "cls", "sep", "mask")}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, **names)


def test_word_pieces(tmp_path: Path) -> None:
    made = linearize.export(encoder(), tmp_path / "a.gguf", format="gguf", tokenizer=pieces(lower=True))
    assert made.facts["vocabulary"] == "34 WordPieces"
    with pytest.raises(UsageError, match="found a WordPiece tokenizer that keeps capitals"):
        linearize.export(encoder(), tmp_path / "b.gguf", format="gguf", tokenizer=pieces(lower=False))
    with pytest.raises(UsageError, match=r"found a WordPiece tokenizer. Leave it out"):
        linearize.export(llama(), tmp_path / "b.gguf", format="gguf", tokenizer=pieces(lower=True))
