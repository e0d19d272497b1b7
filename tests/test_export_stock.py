"""Stock folders: loaded by transformers and timm in a process without linearize."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import linearize
from linearize.compress import compress
from linearize.errors import ExportError, UsageError
from tests.exported import IDS, elsewhere, llama, off, small, transformer, vit
from tests.toys import QUIET

BATCH = {"input_ids": torch.randint(3, 60, (40, 10), generator=torch.Generator().manual_seed(1))}


def vocabulary(folder: Path) -> None:
    """A tokenizer of 64 words beside the model, as its user puts it there."""
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    words = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[MASK]", *(f"w{i}" for i in range(3, 64))])}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, "[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    special = {f"{word.lower()}_token": f"[{word}]" for word in ("PAD", "UNK", "MASK")}
    transformers.PreTrainedTokenizerFast(tokenizer_object=made, **special).save_pretrained(folder)


@pytest.mark.slow
def test_from_pretrained_and_a_pipeline_without_linearize(tmp_path: Path) -> None:
    model = transformer("BertForMaskedLM", "BertConfig")
    result = compress(model, [BATCH] * 3, flops=0.8, stock=True, **QUIET)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "of another").touch()
    with pytest.raises(UsageError, match="exists already"):
        linearize.export(result.model, tmp_path / "folder", format="stock")
    made = linearize.export(result.model, tmp_path / "folder", format="stock", overwrite=True, card=True)
    assert sorted(made.files) == ["README.md", "config.json", "model.safetensors"]
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
    assert "AutoModelForMaskedLM.from_pretrained('folder')" in (tmp_path / "folder" / "README.md").read_text()
    assert "intermediate_size 96 -> " in made.facts["config"]
    assert made.proof is not None
    assert made.proof.error <= 1e-5
    vocabulary(tmp_path / "folder")
    found = elsewhere(
        """
        import transformers
        model = transformers.AutoModelForMaskedLM.from_pretrained(folder)
        found["logits"] = model(input_ids=ids).logits
        fill = transformers.pipeline("fill-mask", model=folder)
        found["best"] = torch.tensor([guess["token"] for guess in fill("w5 w9 [MASK] w7")])
        """,
        folder=tmp_path / "folder",
        ids=IDS,
    )
    expected = result.model(input_ids=IDS).logits
    assert off(expected, found["logits"]) <= 1e-5
    assert off(model(input_ids=IDS).logits, found["logits"]) > 1e-2, "negative control"
    masked = result.model(input_ids=torch.tensor([[5, 9, 2, 7]])).logits[0, 2]
    assert found["best"].tolist() == masked.topk(5).indices.tolist()


@pytest.mark.slow
def test_a_timm_model_of_other_arguments(tmp_path: Path) -> None:
    model = vit()
    images = torch.randn(20, 3, 32, 32)
    small = compress(model, [images] * 3, flops=0.8, stock=True, round_to=8, **QUIET).model
    made = linearize.export(small, tmp_path / "folder", format="stock")
    assert 0 < made.facts["arguments"]["mlp_ratio"] < 3
    assert made.proof is not None
    assert made.proof.error <= 1e-5
    code = """
        import timm
        model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
        found["y"] = model(images)
    """
    found = elsewhere(code, folder=tmp_path / "folder", images=images)["y"]
    assert off(small(images), found) <= 1e-5
    assert off(model(images), found) > 1e-2, "negative control"


def test_what_no_config_says(tmp_path: Path) -> None:
    def refuse(model: nn.Module, match: str) -> None:
        with pytest.raises(ExportError, match=match):
            linearize.export(model, tmp_path / "folder", format="stock")
        assert list(tmp_path.iterdir()) == []

    refuse(small("llama")[1], r"model.layers.0.mlp.*: found \w+, which no stock model has.*nearest .*: \"remote\"")
    refuse(small("vit")[1], r"blocks.0.mlp.\w+: found \w+, which no stock model has")
    uneven: Any = llama()
    uneven.model.layers[1].mlp.gate_proj = nn.Linear(32, 40, bias=False)
    uneven.model.layers[1].mlp.up_proj = nn.Linear(32, 40, bias=False)
    uneven.model.layers[1].mlp.down_proj = nn.Linear(40, 32, bias=False)
    refuse(
        uneven,
        r"layers.1.mlp.gate_proj.weight: is 40 x 32 where .*layers.0.mlp.gate_proj.weight is 96 x 32, and one number",
    )
    biased: Any = llama()
    biased.model.layers[0].mlp.down_proj = nn.Linear(96, 32)
    refuse(biased, r"layers.0.mlp.down_proj.bias: is no tensor of a stock model")
    one: Any = vit()
    one.blocks[1].mlp.fc1, one.blocks[1].mlp.fc2 = nn.Linear(64, 40), nn.Linear(40, 64)
    refuse(one, r"blocks.1.mlp.fc1.weight: is 40 x 64 where blocks.0.mlp.fc1.weight is 192 x 64")
    refuse(nn.Sequential(nn.Linear(2, 2)), r"Sequential: found no transformers config")
