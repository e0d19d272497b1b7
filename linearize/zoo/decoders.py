"""Llama-like decoders of transformers as plain data: what each layer holds, and its tensors by their roles.

Shape letters: D hidden size, H heads, G key/value heads, W width of an FFN, V words of the vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from linearize.zoo.transformers_models import is_transformers
from linearize.zoo.unlike import Unlike

__all__ = ["DecoderLayer", "DecoderWeights", "read_decoder"]

KINDS = ("llama", "mistral", "qwen2", "qwen3")
"""`model_type` of configurations whose models are read here."""

_ONE = 1.2784645427610738  # where x * sigmoid(x) is 1
_ATTENTION = {"attn_q": "q_proj", "attn_k": "k_proj", "attn_v": "v_proj", "attn_output": "o_proj"}


@dataclass(frozen=True)
class DecoderLayer:
    """One layer.

    Attributes:
        path: in the model.
        attention: "full", "map" for one matrix in its place, or "none".
        heads, groups: H and G; 0 where there is no attention.
        width: W; 0 where there is no FFN.
        tensors: by role and kind, such as "attn_q.weight".
    """

    path: str
    attention: Literal["full", "map", "none"]
    heads: int
    groups: int
    width: int
    tensors: dict[str, Tensor] = field(default_factory=dict, repr=False)

    @property
    def biased(self) -> list[str]:
        """Roles with a bias."""
        return [name.removesuffix(".bias") for name in self.tensors if name.endswith(".bias")]


@dataclass(frozen=True)
class DecoderWeights:
    """A whole model.

    Attributes:
        kind: `model_type` of its configuration.
        config: the configuration.
        layers: in order.
        head_dim: features of a head.
        rotary: for each pair of a head's features, the angle per position.
        tensors: "token_embd.weight", "output_norm.weight", and "output.weight" if it is not the first.
    """

    kind: str
    config: Any
    layers: tuple[DecoderLayer, ...]
    head_dim: int
    rotary: Tensor
    tensors: dict[str, Tensor] = field(repr=False)

    @property
    def uneven(self) -> str:
        """Path of the first layer that differs from the first in what it holds; "" if none does."""
        said = [(layer.attention, layer.heads, layer.groups, layer.width) for layer in self.layers]
        return next((layer.path for layer, one in zip(self.layers, said, strict=True) if one != said[0]), "")


def read_decoder(model: nn.Module) -> DecoderWeights:
    """Read a causal language model.

    Linear channels of its gated units that were folded into one product are told as ordinary channels whose gate is
    constant: a row of zeros, and the bias at which the activation gives 1.

    Raises:
        Unlike: it is none of those known, or a layer is not as theirs are.
    """
    name, whole = type(model).__name__, cast("Any", model)
    config: Any = getattr(model, "config", None)
    kind = getattr(config, "model_type", None)
    if not is_transformers(model) or kind not in KINDS:
        raise Unlike(name, f"is no causal language model of the kinds {', '.join(KINDS)}")
    body: Any = getattr(whole, "model", None)
    head: Any = getattr(whole, "lm_head", None)
    if type(head) is not nn.Linear or not hasattr(body, "layers"):
        raise Unlike(name, "has no layers under .model.layers, or no linear .lm_head")
    _check_config(config)
    layers = tuple(_layer(layer, f"model.layers.{i}") for i, layer in enumerate(body.layers))
    if not layers:
        raise Unlike("model.layers", "holds no layer")
    embed, norm, rotary = (getattr(body, part) for part in ("embed_tokens", "norm", "rotary_emb"))
    tensors = {"token_embd.weight": embed.weight, "output_norm.weight": norm.weight}
    if head.weight is not embed.weight:
        tensors["output.weight"] = head.weight
    if "bias" in dict(head.named_parameters()):
        raise Unlike("lm_head", "has a bias")
    if abs(float(rotary.attention_scaling) - 1) > 0:
        raise Unlike("model.rotary_emb", f"scales attention by {rotary.attention_scaling}")
    return DecoderWeights(kind, config, layers, _head_dim(config), rotary.inv_freq.detach().double(), tensors)


def _head_dim(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _check_config(config: Any) -> None:
    rope = getattr(config, "rope_parameters", None) or {}
    kind = rope.get("rope_type", "default")
    if kind not in ("default", "linear", "llama3"):
        raise Unlike("config.rope_parameters", f"are of the type {kind!r}, which depends on the length")
    window = getattr(config, "sliding_window", None)
    used = getattr(config, "use_sliding_window", True)
    if window and used and window < config.max_position_embeddings:
        raise Unlike("config.sliding_window", f"is {window}, less than the context of {config.max_position_embeddings}")


def _layer(layer: Any, path: str) -> DecoderLayer:
    tensors = {"attn_norm.weight": _norm(layer, "input_layernorm", path)}
    tensors["ffn_norm.weight"] = _norm(layer, "post_attention_layernorm", path)
    attention, heads, groups = _attention(layer.self_attn, f"{path}.self_attn", tensors)
    width = _ffn(layer.mlp, f"{path}.mlp", tensors)
    if not width:
        del tensors["ffn_norm.weight"]
    if attention == "none":
        del tensors["attn_norm.weight"]
    return DecoderLayer(path, attention, heads, groups, width, tensors)


def _norm(layer: Any, name: str, path: str) -> Tensor:
    norm = getattr(layer, name, None)
    if norm is None or list(dict(norm.named_parameters())) != ["weight"]:
        raise Unlike(f"{path}.{name}", f"is a {type(norm).__name__}, where a norm with a weight is expected")
    weight: Tensor = norm.weight
    return weight


def _attention(module: Any, path: str, tensors: dict[str, Tensor]) -> tuple[Literal["full", "map", "none"], int, int]:
    """What stands for the attention; its tensors are added."""
    inner = getattr(module, "linear", module)
    if isinstance(inner, nn.Linear):
        if inner.bias is not None and bool(inner.bias.detach().any()):
            raise Unlike(path, "is one matrix with a bias")
        if not bool(inner.weight.detach().any()):
            return "none", 0, 0
        tensors["attn_output.weight"] = inner.weight
        return "map", 0, 0
    if not all(type(getattr(module, part, None)) is nn.Linear for part in _ATTENTION.values()):
        raise Unlike(path, f"is a {type(module).__name__}, which has no plain {', '.join(_ATTENTION.values())}")
    size = int(module.head_dim)
    for role, part in _ATTENTION.items():
        _add(tensors, role, getattr(module, part))
    for role, part in (("attn_q_norm", "q_norm"), ("attn_k_norm", "k_norm")):
        if getattr(module, part, None) is not None:
            tensors[f"{role}.weight"] = getattr(module, part).weight
    heads, groups = module.q_proj.out_features // size, module.k_proj.out_features // size
    if heads != groups * module.num_key_value_groups:
        raise Unlike(
            path, f"has {heads} heads for {groups} of keys, and shares each among {module.num_key_value_groups}"
        )
    if abs(float(module.scaling) - size**-0.5) > 1e-9:
        raise Unlike(path, f"scales by {module.scaling}")
    return "full", heads, groups


def _add(tensors: dict[str, Tensor], role: str, linear: nn.Linear) -> None:
    tensors[f"{role}.weight"] = linear.weight
    if linear.bias is not None:
        tensors[f"{role}.bias"] = linear.bias


def _ffn(module: Any, path: str, tensors: dict[str, Tensor]) -> int:
    """The width of the FFN, whose tensors are added; 0 if there is none."""
    inner = getattr(module, "linear", module)
    if isinstance(inner, nn.Linear):
        if any(bool(p.detach().any()) for p in inner.parameters()):
            raise Unlike(path, "is one linear map, where an FFN is expected")
        return 0
    found: dict[str, Any] = {part: getattr(module, part, None) for part in ("gate_proj", "up_proj", "down_proj")}
    (gate, up, down), act = found.values(), cast("Any", getattr(module, "act_fn", None))
    ones = _constant_rows(gate)
    for part, layer in found.items():
        if type(layer) is not nn.Linear and not (layer is gate and ones):
            raise Unlike(f"{path}.{part}", f"is a {type(layer).__name__}, where a plain matrix is expected")
    _check_silu(act.activation if ones and hasattr(act, "keep") else act, f"{path}.act_fn")
    if ones and act.keep != gate.at:
        raise Unlike(f"{path}.act_fn", f"acts on {act.keep} channels, and {gate.at} have a gate")
    _add(tensors, "ffn_up", up)
    _add(tensors, "ffn_down", down)
    if ones:
        tensors |= _with_constants(gate.linear, ones)
    else:
        _add(tensors, "ffn_gate", gate)
    return int(up.out_features)


def _constant_rows(gate: Any) -> int:
    """How many features of ones a gate has behind its own."""
    ours = type(gate).__module__.startswith("linearize.") and type(gate).__name__ == "OnesLinear"
    return int(gate.ones) if ours and gate.at == gate.linear.out_features else 0


def _with_constants(linear: nn.Linear, ones: int) -> dict[str, Tensor]:
    """The gate as an ordinary matrix and bias: what the activation makes 1 stands where ones stood."""
    weight, bias = linear.weight.detach(), linear.bias
    own = torch.zeros(linear.out_features, dtype=weight.dtype) if bias is None else bias.detach()
    return {
        "ffn_gate.weight": torch.cat((weight, weight.new_zeros(ones, weight.shape[1]))),
        "ffn_gate.bias": torch.cat((own.to(weight), weight.new_full((ones,), _ONE))),
    }


@torch.no_grad()
def _check_silu(act: Any, path: str) -> None:
    x = torch.linspace(-6, 6, 25, dtype=torch.float64)
    try:
        same = torch.allclose(act(x), functional.silu(x), rtol=1e-9, atol=1e-12)
    except Exception:  # whatever stands there
        same = False
    if not same:
        raise Unlike(path, f"is a {type(act).__name__}, where SiLU is expected")
