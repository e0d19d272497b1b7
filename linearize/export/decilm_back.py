"""Read a DeciLM folder as the servers' sources do: which tensors there must be, and what is computed with them."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from linearize.errors import ExportError

__all__ = ["read_back", "wanted"]

_STEP = 256


class _Nothing(nn.Module):
    """What stands for an attention or an FFN that is gone: it gives zeros."""

    def __init__(self, results: int) -> None:
        super().__init__()
        self.results = results

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As many results as what stood here gave."""
        x: Tensor = args[0] if args else kwargs["hidden_states"]
        return torch.zeros_like(x) if self.results == 1 else (torch.zeros_like(x), None)


def read_back(path: Path, tensors: Mapping[str, Tensor]) -> nn.Module:
    """The model that a folder describes, made of a Llama's parts.

    Raises:
        ExportError: tensors are missing, too many, or of another shape than the configuration says.
    """
    from transformers import LlamaForCausalLM

    config = _config(path)
    needed = wanted(config)
    for name in needed.keys() | tensors.keys():
        if name not in needed or name not in tensors or tuple(tensors[name].shape) != needed[name]:
            have = tuple(tensors[name].shape) if name in tensors else "absent"
            found = f"is {have}, where the configuration says {needed.get(name, 'absent')}"
            raise ExportError(name, found, "Please report this model.")
    with torch.device("meta"):
        model: Any = LlamaForCausalLM(config)
        for layer, block in zip(model.model.layers, config.block_configs, strict=True):
            _narrow(layer, block, config)
    model.load_state_dict(dict(tensors), assign=True, strict=False)
    model.tie_weights()
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    made: nn.Module = model.eval()
    return made


def _config(path: Path) -> Any:
    """Load a folder by the file beside it, as `trust_remote_code` does."""
    spec = importlib.util.spec_from_file_location("_linearize_configuration_decilm", path / "configuration_decilm.py")
    if spec is None or spec.loader is None:  # of a file that is there, it never is
        raise ImportError(str(path))
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.modules[spec.name]
    return module.DeciLMConfig(**json.loads((path / "config.json").read_text(encoding="utf-8")))


def wanted(config: Any) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors that a server makes room for."""
    D, V, size, H = config.hidden_size, config.vocab_size, config.head_dim, config.num_attention_heads
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (V, D), "model.norm.weight": (D,)}
    if not config.tie_word_embeddings:
        found["lm_head.weight"] = (V, D)
    for i, block in enumerate(config.block_configs):
        at = f"model.layers.{i}"
        if not block.attention.no_op:
            G = H // block.attention.n_heads_in_group
            rows = {"q_proj": H * size, "k_proj": G * size, "v_proj": G * size}
            found |= {f"{at}.self_attn.{name}.weight": (n, D) for name, n in rows.items()}
            if getattr(config, "qkv_bias", False):
                found |= {f"{at}.self_attn.{name}.bias": (n,) for name, n in rows.items()}
            found |= {f"{at}.self_attn.o_proj.weight": (D, H * size), f"{at}.input_layernorm.weight": (D,)}
        if not block.ffn.no_op:
            W = _width(block.ffn.ffn_mult, D)
            found |= {f"{at}.mlp.{name}.weight": (W, D) for name in ("gate_proj", "up_proj")}
            found |= {f"{at}.mlp.down_proj.weight": (D, W), f"{at}.post_attention_layernorm.weight": (D,)}
    return found


def _width(mult: float, size: int) -> int:
    """The width of an FFN, as the servers compute it."""
    width = int(2 * mult * size / 3)
    return -(-width // _STEP) * _STEP


def _narrow(layer: Any, block: Any, config: Any) -> None:
    """Give one layer of a Llama the widths that its block says."""
    D, size, H = config.hidden_size, config.head_dim, config.num_attention_heads
    if block.attention.no_op:
        layer.self_attn, layer.input_layernorm = _Nothing(2), nn.Identity()
    else:
        G, bias = H // block.attention.n_heads_in_group, bool(getattr(config, "qkv_bias", False))
        layer.self_attn.num_key_value_groups = block.attention.n_heads_in_group
        layer.self_attn.q_proj = nn.Linear(D, H * size, bias)
        layer.self_attn.k_proj, layer.self_attn.v_proj = nn.Linear(D, G * size, bias), nn.Linear(D, G * size, bias)
    if block.ffn.no_op:
        layer.mlp, layer.post_attention_layernorm = _Nothing(1), nn.Identity()
    else:
        W = _width(block.ffn.ffn_mult, D)
        layer.mlp.gate_proj, layer.mlp.up_proj = nn.Linear(D, W, bias=False), nn.Linear(D, W, bias=False)
        layer.mlp.down_proj = nn.Linear(W, D, bias=False)
