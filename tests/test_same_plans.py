"""Plans of five models, kept as files: changing how the code is laid out must not change what it computes.

`python -m tests.test_same_plans` writes them anew: for a change that is meant to change them.
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

FOLDER = Path(__file__).parent / "plans"
OLD = ("channels", "blocks", "lines", "modules")  # the families that there were when the plans were stored
KEPT = ("site", "form", "linear", "dropped", "rank", "channels")  # exactly; losses and outputs to rounding
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


MODELS: dict[str, Callable[[], Made]] = {
    "mlp": _mlp, "convolutional": _convolutional, "vision": _vision, "decoder": _decoder, "units": _units
}  # fmt: skip


def _compressed(name: str) -> dict[str, Any]:
    torch.manual_seed(0)
    model, data, budget = MODELS[name]()
    model.eval()
    result = linearize.compress(model, data, rounds=0, progress=False, cache=False, search=4, families=OLD, **budget)
    batch = data[0]
    with torch.no_grad():
        output = result.model(**batch) if isinstance(batch, dict) else result.model(batch)
    values = getattr(output, "logits", output)
    sites = [asdict(site) for site in result.plan.sites]
    return {"sites": json.loads(json.dumps(sites)), "output": values.flatten()[:16].tolist()}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.filterwarnings("ignore:.*the covariance has no full rank")
@pytest.mark.slow
def test_a_plan_and_its_model_are_as_they_were(name: str) -> None:
    before = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    now = _compressed(name)
    assert [{key: site[key] for key in KEPT} for site in now["sites"]] == [
        {key: site[key] for key in KEPT} for site in before["sites"]
    ]
    assert [site["loss"] for site in now["sites"]] == pytest.approx(
        [site["loss"] for site in before["sites"]], rel=1e-4
    )
    assert now["output"] == pytest.approx(before["output"], rel=1e-4, abs=1e-5)


def main() -> None:
    """Write all plans."""
    FOLDER.mkdir(exist_ok=True)
    torch.set_num_threads(1)
    for name in MODELS:
        text = json.dumps(_compressed(name), indent=1)
        (FOLDER / f"{name}.json").write_text(text + "\n", encoding="utf-8")
        sys.stdout.write(f"{name}\n")


if __name__ == "__main__":
    main()
