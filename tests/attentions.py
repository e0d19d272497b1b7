"""Small models with attention in its layouts, and what tests of heads, depth and attention ask of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

SIZES: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 64}
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def llama(kv: int = 4, implementation: str = "sdpa", layers: int = 2, **more: Any) -> nn.Module:
    """A decoder of eight query heads, with so many of keys and values; far from linear."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {**SIZES, **IDS, "num_hidden_layers": layers, "num_attention_heads": 8, "initializer_range": 0.2, **more}
    config = LlamaConfig(num_key_value_heads=kv, attn_implementation=implementation, **sizes)
    return LlamaForCausalLM(config).eval()


def bert(implementation: str = "sdpa", layers: int = 2) -> nn.Module:
    """An encoder with norms behind its residuals."""
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    sizes = {**SIZES, "num_hidden_layers": layers, "num_attention_heads": 4, "initializer_range": 0.2}
    config = BertConfig(num_labels=3, attn_implementation=implementation, **sizes)
    return BertForSequenceClassification(config).eval()


def gpt2() -> nn.Module:
    """Queries, keys and values in one map whose weight lies the other way round."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    sizes = {"n_embd": 32, "n_head": 4, "n_layer": 2, "n_inner": 48, "vocab_size": 64, "initializer_range": 0.2}
    return GPT2LMHeadModel(GPT2Config(bos_token_id=1, eos_token_id=2, pad_token_id=0, **sizes)).eval()


def neox() -> nn.Module:
    """Queries, keys and values of each head side by side."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    torch.manual_seed(0)
    sizes = {**SIZES, **IDS, "num_attention_heads": 4, "initializer_range": 0.2}
    return GPTNeoXForCausalLM(GPTNeoXConfig(**sizes)).eval()


def vit(layers: int = 2, **more: Any) -> nn.Module:
    """timm's, with one map for queries, keys and values."""
    import timm

    torch.manual_seed(0)
    sizes: Any = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": layers, "num_heads": 4, "num_classes": 10}
    model = timm.create_model("vit_tiny_patch16_224", **sizes, **more).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4.0 if parameter.dim() == 2 else 1.0)
    return model


def tokens(count: int = 4, length: int = 10, seed: int = 0) -> dict[str, Tensor]:
    """Ids that are neither padding nor an end."""
    generator = torch.Generator().manual_seed(seed)
    return {"input_ids": torch.randint(3, 64, (count, length), generator=generator)}


def images(count: int = 4, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


LAYOUTS: dict[str, tuple[Callable[[], nn.Module], Callable[..., Any]]] = {
    "grouped": (llama, tokens),
    "grouped, eager": (lambda: llama(implementation="eager"), tokens),
    "one group": (lambda: llama(kv=1), tokens),
    "each its own": (lambda: llama(kv=8), tokens),
    "encoder": (bert, tokens),
    "encoder, eager": (lambda: bert("eager"), tokens),
    "packed, transposed": (gpt2, tokens),
    "packed, interleaved": (neox, tokens),
    "packed, images": (vit, images),
}


@torch.no_grad()
def logits(model: nn.Module, batch: Any) -> Tensor:
    output = model.eval()(**batch) if isinstance(batch, dict) else model.eval()(batch)
    found: Tensor = getattr(output, "logits", output)
    return found


def cache_of(model: nn.Module, batch: dict[str, Tensor]) -> Any:
    """The keys and values of one forward."""
    with torch.no_grad():
        output = model(**batch, use_cache=True)
    return output["cache"] if "cache" in output else output["past_key_values"]


def cache_bytes(cache: Any) -> int:
    """Of all that a cache holds."""
    held = [t for layer in cache.layers for t in (getattr(layer, "keys", None), getattr(layer, "values", None))]
    return sum(t.numel() * t.element_size() for t in held if isinstance(t, Tensor))


def generated(model: Any, *, cache: str | None = None, beams: int = 1, padded: bool = True) -> Tensor:
    """Tokens that a model adds to prompts of unequal lengths, padded on the left."""
    ids = tokens(3, 7)["input_ids"]
    mask = torch.ones_like(ids)
    if padded:
        ids[1, :3], mask[1, :3] = 0, 0
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "num_beams": beams, "disable_compile": True}
    if cache is not None:
        options["cache_implementation"] = cache
    found: Tensor = model.generate(input_ids=ids, attention_mask=mask, **options)
    return found
