"""DeciLM: a folder for servers that read per-layer widths from `block_configs`; read back, and run by no server here.

Shape letters: D hidden size, H heads, G heads of keys and values, W width of an FFN.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from linearize.export.compare import distance, expected
from linearize.export.decilm_back import read_back
from linearize.export.face import RUNTIME_TOLERANCES, Means, Proof, Refusal, Subject
from linearize.storage.folders import write_text
from linearize.zoo.decoders import DecoderWeights, read_decoder
from linearize.zoo.unlike import Unlike

__all__ = ["DeciLm"]

_READER = Path(__file__).with_name("decilm_file.py")  # which needs transformers to be imported
_STEP = 256  # the servers round widths up to multiples of this
_PLACES = {
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip
_OUTSIDE = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight",
          "output.weight": "lm_head.weight"}  # fmt: skip
_KEPT = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings",
         "rms_norm_eps", "hidden_act", "bos_token_id", "eos_token_id", "pad_token_id", "initializer_range")  # fmt: skip


class DeciLm:
    """A folder with `DeciLMForCausalLM` as its architecture."""

    name = "decilm"
    suffix = ""
    writes: Mapping[str, str] = {"transformers": "transformers"}
    runs: Mapping[str, str] = {"transformers": "transformers"}
    means = Means(own_layers=False, modules=False, round_to=_STEP)
    tolerances: Mapping[torch.dtype, float] = RUNTIME_TOLERANCES
    options: tuple[str, ...] = ()
    library = "vllm"
    near: tuple[str, ...] = ("gguf", "remote", "onnx")
    fixed = False

    def can(self, model: nn.Module) -> Refusal | None:
        """Decoders whose layers differ in the width of the FFN and in heads of keys, or lack attention or FFN."""
        try:
            _check(read_decoder(model))
        except Unlike as error:
            return Refusal(error.where, error.why)
        return None

    def write(self, subject: Subject, path: Path) -> Mapping[str, Any]:
        """Configuration, the file that reads it, weights."""
        decoder = read_decoder(subject.model)
        path.mkdir()
        config = config_of(decoder, next(subject.model.parameters()).dtype)
        write_text(path / "config.json", json.dumps(config, indent=2) + "\n")
        write_text(path / "configuration_decilm.py", _READER.read_text(encoding="utf-8"))
        save_file(_tensors(decoder), path / "model.safetensors", {"format": "pt"})
        generation: Any = getattr(subject.model, "generation_config", None)
        if generation is not None:
            generation.save_pretrained(path)
        padded = [layer.path for layer in decoder.layers if layer.width % _STEP]
        told = f"{len(padded)} of {len(decoder.layers)} layers, by zeros to multiples of {_STEP}" if padded else "none"
        return {"architecture": "DeciLMForCausalLM", "FFNs padded": told, "proven in": "no server"}

    def check(self, subject: Subject, path: Path) -> Proof:
        """Read the folder back as the servers' sources read it, and compare outputs. No server runs."""
        made = read_back(path, load_file(path / "model.safetensors"))
        twin = Subject(made.to(next(subject.model.parameters()).device), subject.batches)
        error = distance(expected(subject), expected(twin))
        told = "no server ran: every field and tensor was read as the sources of vLLM and SGLang read them"
        return Proof("a reader of its own", error, len(subject.batches), told)

    def usage(self, model: nn.Module) -> str:
        """A program that loads the file."""
        return "import vllm\n\nmodel = vllm.LLM('NAME', trust_remote_code=True)"


def _check(decoder: DecoderWeights) -> None:
    """What the servers cannot be told.

    Raises:
        Unlike: there is something of the kind.
    """
    heads = decoder.config.num_attention_heads
    for i, layer in enumerate(decoder.layers):
        place = f"{layer.path}.self_attn"
        if layer.attention == "map":
            raise Unlike(place, "is one matrix, for which servers have no layer")
        if layer.attention == "none" and i == 0:
            raise Unlike(place, "is gone in the first layer, where servers begin with it")
        if layer.attention == "full" and layer.heads != heads:
            raise Unlike(place, f"has {layer.heads} heads, and one number, {heads}, is for all layers")
        if any(name.startswith("attn_q_norm") for name in layer.tensors):
            raise Unlike(place, "norms its queries")
        wrong = [role for role in layer.biased if role not in ("attn_q", "attn_k", "attn_v")]
        if wrong:
            raise Unlike(f"{layer.path}.{_PLACES[wrong[0]]}", "has a bias, which not all servers read")


def config_of(decoder: DecoderWeights, dtype: torch.dtype) -> dict[str, Any]:
    """What config.json says."""
    own = decoder.config.to_dict()
    rope = dict(own["rope_parameters"])
    size = decoder.config.hidden_size
    blocks = []
    for layer in decoder.layers:
        there, width = layer.attention == "full", -(-layer.width // _STEP) * _STEP
        attention = {"n_heads_in_group": layer.heads // layer.groups if there else None, "no_op": not there}
        ffn = {"ffn_mult": 3 * width / (2 * size) if width else None, "no_op": not width}
        blocks.append({"attention": {**attention, "replace_with_linear": False},
                       "ffn": {**ffn, "replace_with_linear": False}})  # fmt: skip
    biased = any(layer.biased for layer in decoder.layers)
    scaling = {name: value for name, value in rope.items() if name != "rope_theta"}
    return {
        "architectures": ["DeciLMForCausalLM"],
        "model_type": "nemotron-nas",
        "auto_map": {"AutoConfig": "configuration_decilm.DeciLMConfig"},
        **{name: own.get(name) for name in _KEPT},
        "head_dim": decoder.head_dim,
        "num_key_value_heads": max(layer.groups for layer in decoder.layers),
        "intermediate_size": max(-(-layer.width // _STEP) * _STEP for layer in decoder.layers),
        "attention_bias": False,
        **({"qkv_bias": True} if biased else {}),
        "mlp_bias": False,
        "tie_word_embeddings": "output.weight" not in decoder.tensors,
        "rope_parameters": rope,
        # The older names of the same, which some servers read.
        "rope_theta": rope["rope_theta"],
        "rope_scaling": None if scaling.get("rope_type", "default") == "default" else scaling,
        "torch_dtype": str(dtype).removeprefix("torch."),
        "block_configs": blocks,
    }


def _tensors(decoder: DecoderWeights) -> dict[str, Tensor]:
    """Weights by the names that the servers expect."""
    found = {_OUTSIDE[name]: tensor for name, tensor in decoder.tensors.items()}
    biased = any(layer.biased for layer in decoder.layers)
    for i, layer in enumerate(decoder.layers):
        padding = -layer.width % _STEP
        for name, tensor in layer.tensors.items():
            role, _, kind = name.partition(".")
            place = f"model.layers.{i}.{_PLACES[role]}.{kind}"
            found[place] = _padded(role, tensor, padding) if padding and role.startswith("ffn_") else tensor
        if biased and layer.attention == "full":
            for role in ("attn_q", "attn_k", "attn_v"):
                place, weight = f"model.layers.{i}.{_PLACES[role]}", layer.tensors[f"{role}.weight"]
                found.setdefault(f"{place}.bias", weight.new_zeros(len(weight)))
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in found.items()}


def _padded(role: str, tensor: Tensor, padding: int) -> Tensor:
    """More channels that give 0: their gate is that of 0, and nothing reads them."""
    if role == "ffn_norm":
        return tensor
    return functional.pad(tensor.detach(), [0, padding] if role == "ffn_down" else [0, 0, 0, padding])
