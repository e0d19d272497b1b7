"""DeciLM folders: every field as servers read it, and the function read back. No server runs here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from torch import nn

import linearize
from linearize.errors import ExportError
from linearize.export.decilm_back import read_back
from tests.decoders import biased, fewer_groups, narrow, without_attention
from tests.exported import IDS, elsewhere, llama, off, small, transformer


def without_ffn(model: Any, layer: int) -> Any:
    model.model.layers[layer].mlp = nn.Linear(32, 32, bias=False)
    nn.init.zeros_(model.model.layers[layer].mlp.weight)
    return model


def mixed() -> Any:
    """Widths 256, 64 (padded to 256) and 512; one layer without FFN, one without attention, one with fewer keys."""
    model = llama(num_hidden_layers=4, intermediate_size=256)
    narrow(narrow(model, 1, 64), 2, 512)
    without_attention(without_ffn(model, 3), 2, zero=True)
    return fewer_groups(model, 1)


def test_every_field_of_the_config(tmp_path: Path) -> None:
    model = mixed()
    made = linearize.export(model, tmp_path / "folder", format="decilm")
    assert made.proof is not None
    assert made.proof.error <= 1e-5
    assert "no server ran" in str(made)
    assert made.facts["FFNs padded"] == "1 of 4 layers, by zeros to multiples of 256"
    config = json.loads((tmp_path / "folder" / "config.json").read_text())
    assert config["architectures"] == ["DeciLMForCausalLM"]
    assert config["model_type"] == "nemotron-nas"
    assert config["head_dim"] == 8
    assert config["rope_theta"] == 10000.0
    assert (config["rope_scaling"], config["tie_word_embeddings"]) == (None, False)
    attention = [block["attention"] for block in config["block_configs"]]
    ffn = [block["ffn"] for block in config["block_configs"]]
    assert [a["n_heads_in_group"] for a in attention] == [2, 4, None, 2]
    assert [a["no_op"] for a in attention] == [False, False, True, False]
    assert [f["ffn_mult"] for f in ffn] == [12.0, 12.0, 24.0, None]  # width = 2 / 3 * mult * 32
    assert [f["no_op"] for f in ffn] == [False, False, False, True]
    assert not any(part["replace_with_linear"] for part in (*attention, *ffn))
    names = load_file(tmp_path / "folder" / "model.safetensors")
    assert names["model.layers.1.mlp.down_proj.weight"].shape == (32, 256)
    assert not any(".layers.2.self_attn" in name or ".layers.3.mlp" in name for name in names)


@pytest.mark.slow
def test_the_config_is_read_as_attributes_without_linearize(tmp_path: Path) -> None:
    linearize.export(mixed(), tmp_path / "folder", format="decilm")
    found = elsewhere(
        """
        import transformers
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True)
        assert isinstance(config, transformers.LlamaConfig)
        repr(config), config.to_json_string()
        blocks = config.block_configs
        assert not hasattr(blocks[0].ffn, "hidden_act")
        found["groups"] = torch.tensor([b.attention.n_heads_in_group or 0 for b in blocks])
        found["gone"] = torch.tensor([[b.attention.no_op, b.ffn.no_op] for b in blocks])
        """,
        folder=tmp_path / "folder",
    )
    assert found["groups"].tolist() == [2, 4, 0, 2]
    assert found["gone"].tolist() == [[False, False], [False, False], [True, False], [False, True]]


def test_biases_of_queries_and_keys(tmp_path: Path) -> None:
    model = biased(transformer("Qwen2ForCausalLM", "Qwen2Config", num_key_value_heads=2))
    made = linearize.export(model, tmp_path / "folder", format="decilm")
    assert made.proof is not None
    assert made.proof.error <= 1e-5
    assert json.loads((tmp_path / "folder" / "config.json").read_text())["qkv_bias"] is True


def test_reading_back_can_fail(tmp_path: Path) -> None:
    """The proof's own negative control."""
    model = mixed()
    linearize.export(model, tmp_path / "folder", format="decilm")
    file = tmp_path / "folder" / "model.safetensors"
    tensors = load_file(file)
    kept = tensors.pop("model.layers.0.mlp.up_proj.weight")
    with pytest.raises(ExportError, match=r"up_proj.weight: is absent, where the configuration says \(256, 32\)"):
        read_back(tmp_path / "folder", tensors)
    with pytest.raises(ExportError, match="extra: is"):
        read_back(tmp_path / "folder", {**tensors, "model.layers.0.mlp.up_proj.weight": kept, "extra": kept})
    tensors["model.layers.0.mlp.up_proj.weight"] = kept.flip(0)
    save_file(tensors, file)
    other: Any = read_back(tmp_path / "folder", tensors)
    batch: dict[str, Any] = {"input_ids": IDS, "use_cache": False}
    assert off(model(**batch).logits, other(**batch).logits) > 1e-3


@pytest.mark.slow
def test_refusals(tmp_path: Path) -> None:
    def refuse(model: nn.Module, match: str) -> None:
        with pytest.raises(ExportError, match=match):
            linearize.export(model, tmp_path / "folder", format="decilm", example_inputs={"input_ids": IDS})

    refuse(without_attention(llama(), 1, zero=False), 'layers.1.self_attn: is one matrix.*nearest.*"gguf"')
    refuse(without_attention(llama(), 0, zero=True), "layers.0.self_attn: is gone in the first layer")
    refuse(biased(llama(mlp_bias=True)), r"layers.0.mlp.\w+: has a bias, which not all servers read")
    refuse(small("llama")[1], "layers.0.mlp.down_proj: is a CarryLinear")
    third = transformer("Qwen3ForCausalLM", "Qwen3Config", num_key_value_heads=2, head_dim=8)
    refuse(third, "layers.0.self_attn: norms its queries")
