"""Plans of eight models, kept as files: changing how the code is laid out must not change what it computes.

Everything in a plan is compared exactly but the losses, which are sums in float32 that processors add up in different
orders. `python -m tests.test_same_plans` writes the plans anew: for a change that is meant to change them. The families
were such a change: since then each place in a model has random draws of its own, and losses moved by some percent.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import linearize
from linearize.families import registry
from tests.attentions import llama
from tests.attentions import tokens as attentions_tokens
from tests.mixtures import mixtral, texts

FOLDER = Path(__file__).parent / "plans"
OLD = ("channels", "blocks", "lines", "modules")  # the families that there were when the first plans were stored
ROUNDING = 1e-5  # of float32: what sums in another order make of losses and outputs; 1e-6 was seen
Made = tuple[nn.Module, list[Any], dict[str, Any]]


def _mlp() -> Made:
    model = nn.Sequential(
        nn.Linear(12, 48), nn.GELU(), nn.Linear(48, 24), nn.ReLU(), nn.Linear(24, 32), nn.SiLU(), nn.Linear(32, 6)
    )
    return model, [torch.randn(64, 12) for _ in range(6)], {"flops": 0.5}


def _convolutional() -> Made:
    """Inverted residuals: blocks, narrowed chains, and spatial consumers."""
    inner: list[Any] = [
        nn.Conv2d(8, 32, 1), nn.BatchNorm2d(32), nn.ReLU6(),
        nn.Conv2d(32, 32, 3, padding=1, groups=32), nn.BatchNorm2d(32), nn.ReLU6(), nn.Conv2d(32, 8, 1),
    ]  # fmt: skip
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), *inner, nn.Conv2d(8, 24, 3, padding=1), nn.ReLU(),
        nn.Conv2d(24, 8, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5),
    )  # fmt: skip
    for parameter in model.parameters():
        parameter.data *= 2.5 if parameter.dim() > 1 else 1.0
    for norm in (inner[1], inner[4]):
        norm.bias.data += 2.8  # nearly all of its channels are on: a block that one convolution can stand for
    return model, [torch.randn(16, 3, 12, 12) for _ in range(4)], {"activations": 0.3}


def _vision() -> Made:
    import timm

    sizes: Any = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 4, "num_classes": 10}
    model = timm.create_model("vit_tiny_patch16_224", **sizes)
    return model, [torch.randn(8, 3, 32, 32) for _ in range(6)], {"params": 0.3}


def _decoder() -> Made:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes: Any = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes["initializer_range"] = 0.25  # far from linear
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, num_key_value_heads=2, **sizes))
    return model, [{"input_ids": torch.randint(0, 64, (8, 12))} for _ in range(6)], {"flops": 0.75}


def _units() -> Made:
    from transformers import BertConfig, BertForSequenceClassification

    sizes: Any = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes["initializer_range"] = 0.25
    model = BertForSequenceClassification(BertConfig(vocab_size=64, num_labels=3, **sizes))
    batches = [
        {"input_ids": torch.randint(0, 64, (8, 12)), "attention_mask": torch.ones(8, 12, dtype=torch.long)}
        for _ in range(6)
    ]
    return model, batches, {"activations": 0.4}


def _block() -> Made:
    """One convolution in the place of a block."""
    model, data, _ = _convolutional()
    return model, data, {"activations": 0.6}


def _layers() -> Made:
    """Heads, attentions and whole layers of a decoder."""
    model = llama(layers=5)
    return model, [attentions_tokens(4, 12, seed) for seed in range(4)], {"params": 0.5}


def _mixture() -> Made:
    """Experts, their channels, and heads."""
    return mixtral(), texts(4), {"params": 0.6}


MODELS: dict[str, Callable[[], Made]] = {
    "mlp": _mlp, "convolutional": _convolutional, "vision": _vision, "decoder": _decoder, "units": _units,
    "block": _block, "layers": _layers, "mixture": _mixture,
}  # fmt: skip
FAMILIES = {
    "block": ("blocks",),
    "layers": ("channels", "heads", "attention", "depth"),
    "mixture": ("channels", "experts", "heads"),
}


def _compressed(name: str) -> dict[str, Any]:
    torch.manual_seed(0)
    model, data, budget = MODELS[name]()
    model.eval()
    result = linearize.compress(
        model, data, rounds=0, progress=False, cache=False, search=4, families=FAMILIES.get(name, OLD), **budget
    )
    batch = data[0]
    with torch.no_grad():
        output = result.model(**batch) if isinstance(batch, dict) else result.model(batch)
    values = getattr(output, "logits", output)
    sites = [asdict(site) for site in result.plan.sites]
    return {"sites": json.loads(json.dumps(sites)), "output": values.flatten()[:16].tolist()}


@pytest.mark.parametrize(
    "name", [name if name in ("mlp", "decoder") else pytest.param(name, marks=pytest.mark.slow) for name in MODELS]
)
@pytest.mark.filterwarnings("ignore:.*the covariance has no full rank", "ignore:.*tokens for an expert")
def test_a_plan_and_its_model_are_as_they_were(name: str) -> None:
    before = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    now = _compressed(name)
    losses = [[site.pop("loss") for site in made["sites"]] for made in (now, before)]
    assert json.dumps(now["sites"]) == json.dumps(before["sites"])
    assert losses[0] == pytest.approx(losses[1], rel=ROUNDING)
    largest = max(map(abs, before["output"]))
    assert now["output"] == pytest.approx(before["output"], rel=0, abs=ROUNDING * largest)


def test_every_family_with_forms_of_its_own_is_in_a_plan() -> None:
    forms = {site["form"] for name in MODELS for site in json.loads((FOLDER / f"{name}.json").read_text())["sites"]}
    assert {family.name for family in registry.FAMILIES if any(form.name in forms for form in family.forms)} >= {
        "blocks", "modules", "heads", "experts", "attention", "depth"
    }  # fmt: skip


def main() -> None:
    """Write all plans."""
    FOLDER.mkdir(exist_ok=True)
    torch.set_num_threads(1)
    for name in sys.argv[1:] or MODELS:
        text = json.dumps(_compressed(name), indent=1)
        (FOLDER / f"{name}.json").write_text(text + "\n", encoding="utf-8")
        sys.stdout.write(f"{name}\n")


if __name__ == "__main__":
    main()
