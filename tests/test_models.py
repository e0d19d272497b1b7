"""The chain on real architectures: timm's test models and tiny transformers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import linearize
from linearize.graph.capture import tensors_of
from tests.chain import check_chain, error, outputs, randomize

timm = pytest.importorskip("timm")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.zoo

TIMM = sorted(timm.list_models("test_*"))
IDS = torch.randint(0, 90, (2, 7), generator=torch.Generator().manual_seed(0))


def awake(model: nn.Module) -> nn.Module:
    """Random values where an initialisation hides the layer: near-zero layer scales, norms that are the identity."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() <= 1 and parameter.is_floating_point():
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
        for module in model.modules():
            variance = getattr(module, "running_var", None)
            if isinstance(variance, torch.Tensor):
                variance.uniform_(0.5, 2.0, generator=generator)
    return model.eval()


@pytest.mark.parametrize("name", TIMM)
@pytest.mark.parametrize("share", [0.5, 1.0])
def test_timm(name: str, share: float) -> None:
    torch.manual_seed(0)
    model = awake(timm.create_model(name, num_classes=7)).double()
    size = timm.get_pretrained_cfg(name).input_size
    check_chain(model, torch.randn(1, *size, dtype=torch.float64), share)


def tiny(kind: str) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """A tiny model of a transformers class, randomly initialised, and inputs for it."""
    small = {
        "vocab_size": 99,
        "hidden_size": 16,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    t5 = {"vocab_size": 99, "d_model": 16, "d_ff": 48, "num_layers": 2, "num_heads": 2, "d_kv": 8}
    gpt2 = {"vocab_size": 99, "n_embd": 16, "n_layer": 2, "n_head": 2, "bos_token_id": 1, "eos_token_id": 2}
    marian: dict[str, Any] = {
        "vocab_size": 99,
        "d_model": 16,
        "pad_token_id": 98,
        "decoder_start_token_id": 98,
        "eos_token_id": 0,
    }
    for side in ("encoder", "decoder"):
        marian |= {f"{side}_layers": 2, f"{side}_attention_heads": 2, f"{side}_ffn_dim": 48}
    vit = {key: value for key, value in small.items() if key != "vocab_size"} | {"image_size": 16, "patch_size": 4}
    pair = {"input_ids": IDS, "decoder_input_ids": IDS}
    made: dict[str, tuple[Any, Any, dict[str, torch.Tensor]]] = {
        "bert": (transformers.BertModel, transformers.BertConfig(**small), {"input_ids": IDS}),
        "gpt2": (transformers.GPT2LMHeadModel, transformers.GPT2Config(**gpt2), {"input_ids": IDS}),
        "llama": (
            transformers.LlamaForCausalLM,
            transformers.LlamaConfig(**small, num_key_value_heads=1, bos_token_id=1, eos_token_id=2),
            {"input_ids": IDS},
        ),
        "phi3": (
            transformers.Phi3ForCausalLM,
            transformers.Phi3Config(**small, num_key_value_heads=1, pad_token_id=0, bos_token_id=1, eos_token_id=2),
            {"input_ids": IDS},
        ),
        "t5": (transformers.T5ForConditionalGeneration, transformers.T5Config(**t5, decoder_start_token_id=0), pair),
        "t5_gated": (
            transformers.T5ForConditionalGeneration,
            transformers.T5Config(**t5, decoder_start_token_id=0, feed_forward_proj="gated-gelu"),
            pair,
        ),
        "vit": (
            transformers.ViTForImageClassification,
            transformers.ViTConfig(**vit),
            {"pixel_values": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))},
        ),
        "marian": (transformers.MarianMTModel, transformers.MarianConfig(**marian), pair),
    }
    torch.manual_seed(0)
    model_class, config, inputs = made[kind]
    return awake(model_class(config)), inputs


KINDS = ["bert", "gpt2", "llama", "phi3", "t5", "t5_gated", "vit", "marian"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("share", [0.5, 1.0])
def test_transformers(kind: str, share: float) -> None:
    model, inputs = tiny(kind)
    _, collapsed = check_chain(model, inputs, share)
    forms = {type(module).__name__ for module in collapsed.modules()}
    assert ("PartialActivation" in forms) == (share < 1.0)


@pytest.mark.parametrize("kind", ["gpt2", "llama", "t5", "marian"])
def test_generate_gives_the_same_tokens(kind: str) -> None:
    model, inputs = tiny(kind)
    gated = linearize.convert(model, inputs)
    randomize(gated, 0.5)
    collapsed = linearize.collapse(gated, when="always")
    tokens = [
        m.generate(inputs["input_ids"], max_new_tokens=12, do_sample=False, use_cache=True, pad_token_id=3)  # type: ignore[operator]
        for m in (model, gated, collapsed)
    ]
    assert torch.equal(tokens[1], tokens[2])


def test_layers_shared_between_blocks_stay_a_partial_activation() -> None:
    config = transformers.AlbertConfig(
        vocab_size=99,
        embedding_size=16,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
    )
    gated, _ = check_chain(awake(transformers.AlbertModel(config)), {"input_ids": IDS})
    rows = {site.name: site for site in linearize.summary(gated).sites}
    ffn = next(row for name, row in rows.items() if "albert_layers" in name)
    assert ffn.form == "partial activation"
    assert "more than once" in (ffn.reason or "")


@pytest.mark.parametrize("name", ["resnet18", "densenet121", "mobilenet_v3_small"])
def test_torchvision(name: str) -> None:
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(0)
    model = awake(getattr(torchvision.models, name)(num_classes=5)).double()
    check_chain(model, torch.randn(1, 3, 32, 32, dtype=torch.float64))


def test_a_rewritten_model_keeps_its_methods() -> None:
    """timm's own entry points run on the gated and the collapsed model alike."""
    model = awake(timm.create_model("test_convnext", num_classes=7)).double()
    x = torch.randn(1, 3, 160, 160, dtype=torch.float64)
    gated = linearize.convert(model, x)
    randomize(gated, 0.5)
    collapsed: Any = linearize.collapse(gated)
    with torch.no_grad():
        features = collapsed.forward_features(x)
        assert torch.equal(collapsed.forward_head(features), collapsed(x))
        collapsed.reset_classifier(3)
        assert collapsed(x).shape == (1, 3)


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_gradient_checkpointing(kind: str) -> None:
    model, inputs = tiny(kind)
    gated: Any = linearize.convert(model, inputs)
    randomize(gated, 0.5)
    collapsed: Any = linearize.collapse(gated)
    for rewritten in (gated, collapsed):
        rewritten.train()
        gradients = []
        for checkpointed in (False, True):
            if checkpointed:
                enable = getattr(rewritten, "activation_checkpointing_enable", None)  # the name since transformers 5.20
                (enable or rewritten.gradient_checkpointing_enable)()
            rewritten.zero_grad()
            torch.manual_seed(0)
            tensors_of(rewritten(**inputs))[0].square().mean().backward()
            gradients.append([p.grad.clone() for p in rewritten.parameters() if p.grad is not None])
        assert error(*gradients) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype: torch.dtype) -> None:
    """In 8 or 11 bits of mantissa both models are as far from the float32 function as each other."""
    model, inputs = tiny("vit")
    gated = linearize.convert(model, inputs)
    randomize(gated, 0.5)
    exact = outputs(gated, inputs)
    collapsed = linearize.collapse(gated)
    low = {key: value.to(dtype) for key, value in inputs.items()}
    errors = [error([t.to(dtype) for t in exact], outputs(m.to(dtype), low)) for m in (gated, collapsed)]
    assert errors[1] <= 2 * errors[0] + 4 * torch.finfo(dtype).eps
