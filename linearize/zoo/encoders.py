"""BERT encoders of transformers as plain data: what each layer holds, and its tensors by their roles.

Shape letters: D hidden size, H heads, W width of an FFN, V words of the vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from linearize.zoo.transformers_models import is_transformers
from linearize.zoo.unlike import Unlike

__all__ = ["EncoderWeights", "is_encoder", "read_encoder"]

_PARTS = {
    "attn_q": "attention.self.query",
    "attn_k": "attention.self.key",
    "attn_v": "attention.self.value",
    "attn_output": "attention.output.dense",
    "attn_output_norm": "attention.output.LayerNorm",
    "ffn_up": "intermediate.dense",
    "ffn_down": "output.dense",
    "layer_output_norm": "output.LayerNorm",
}
_EMBEDDINGS = {
    "token_embd": "word_embeddings",
    "position_embd": "position_embeddings",
    "token_types": "token_type_embeddings",
    "token_embd_norm": "LayerNorm",
}


@dataclass(frozen=True)
class EncoderWeights:
    """A whole encoder.

    Attributes:
        config: its configuration.
        widths: W of each layer.
        tensors: by role and kind, such as "blk.0.attn_q.weight".
    """

    config: Any
    widths: tuple[int, ...]
    tensors: dict[str, Tensor] = field(repr=False)


def is_encoder(model: nn.Module) -> bool:
    """Whether a model is a BERT encoder of transformers, whatever its layers became."""
    kind = getattr(getattr(model, "config", None), "model_type", None)
    return kind == "bert" and is_transformers(model) and hasattr(model, "embeddings") and hasattr(model, "encoder")


def read_encoder(model: nn.Module) -> EncoderWeights:
    """Read a BERT encoder: post-norm layers, learned positions, GELU.

    Raises:
        Unlike: it is none, or a layer is not as theirs are.
    """
    whole: Any = model
    if not is_encoder(model):
        raise Unlike(type(model).__name__, "is no BERT encoder (BertModel)")
    config = whole.config
    if config.is_decoder:
        raise Unlike("config.is_decoder", "is True, and a decoder attends otherwise")
    tensors: dict[str, Tensor] = {}
    for role, part in _EMBEDDINGS.items():
        _add(tensors, role, getattr(whole.embeddings, part, None), f"embeddings.{part}")
    widths = []
    for i, layer in enumerate(whole.encoder.layer):
        path = f"encoder.layer.{i}"
        for role, part in _PARTS.items():
            _add(tensors, f"blk.{i}.{role}", _at(layer, part), f"{path}.{part}")
        _check_heads(_at(layer, "attention.self"), config, f"{path}.attention.self")
        _check_gelu(_at(layer, "intermediate.intermediate_act_fn"), f"{path}.intermediate.intermediate_act_fn")
        widths.append(int(tensors[f"blk.{i}.ffn_up.weight"].shape[0]))
    if not widths:
        raise Unlike("encoder.layer", "holds no layer")
    return EncoderWeights(config, tuple(widths), tensors)


def _at(layer: nn.Module, path: str) -> Any:
    try:
        return layer.get_submodule(path)
    except AttributeError:
        return None


def _add(tensors: dict[str, Tensor], role: str, layer: Any, path: str) -> None:
    """The tensors of a stock layer."""
    if type(layer) not in (nn.Linear, nn.LayerNorm, nn.Embedding):
        found = "gone" if layer is None else f"a {type(layer).__name__}"
        raise Unlike(path, f"is {found}, where a stock layer is expected")
    tensors[f"{role}.weight"] = layer.weight
    if type(layer) is not nn.Embedding:
        bias = layer.bias
        tensors[f"{role}.bias"] = layer.weight.new_zeros(layer.weight.shape[0]) if bias is None else bias


def _check_heads(attention: Any, config: Any, path: str) -> None:
    heads, features = attention.num_attention_heads, attention.query.out_features
    if heads != config.num_attention_heads or features != config.hidden_size:
        wanted = f"the configuration says {config.num_attention_heads} of {config.hidden_size}"
        raise Unlike(path, f"has {heads} heads of {features} features together, where {wanted}")


@torch.no_grad()
def _check_gelu(act: Any, path: str) -> None:
    x = torch.linspace(-6, 6, 25, dtype=torch.float64)
    try:
        y = act(x)
        same = any(torch.allclose(y, functional.gelu(x, approximate=way), atol=1e-9) for way in ("none", "tanh"))
    except Exception:  # whatever stands there
        same = False
    if not same:
        raise Unlike(path, f"is a {type(act).__name__}, where GELU is expected")
