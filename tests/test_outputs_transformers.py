"""Outputs and batches of transformers: rerankers, spans, labels of several kinds, sequences to sequences."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from linearize import calibrate, compress, convert, finetune
from linearize.running.batches import read_batch
from linearize.training.distance import real_loss
from linearize.training.divergence import distances
from tests.toys import QUIET

transformers: Any = pytest.importorskip("transformers")
SMALL = {"vocab_size": 60, "hidden_size": 16, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}


def ids(seed: int, batch: int = 6, length: int = 7) -> Tensor:
    return torch.randint(3, 60, (batch, length), generator=torch.Generator().manual_seed(seed))


def texts(count: int = 6, **more: Any) -> list[dict[str, Any]]:
    found = []
    for seed in range(count):
        mask = torch.ones(6, 7, dtype=torch.long)
        mask[:3, 5:] = 0
        found.append(
            {"input_ids": ids(seed), "attention_mask": mask, **{k: make(ids(seed)) for k, make in more.items()}}
        )
    return found


def bert(kind: str, **options: Any) -> nn.Module:
    config = transformers.BertConfig(**SMALL, initializer_range=0.3, **options)
    model: nn.Module = getattr(transformers, kind)(config)
    return model.eval()


def parts_of(model: nn.Module, raw: dict[str, Any]) -> dict[str, tuple[str, int]]:
    batch = read_batch(model, raw)
    with torch.no_grad():
        output = batch.run(model)
    return {part.name: (part.kind, part.axis) for part in batch.meaning.parts(output, batch.labels)}


@pytest.mark.parametrize(
    ("kind", "options", "expected"),
    [
        ("BertForSequenceClassification", {"num_labels": 1}, {"logits": ("values", -1)}),
        ("BertForSequenceClassification", {"num_labels": 4}, {"logits": ("classes", -1)}),
        (
            "BertForSequenceClassification",
            {"num_labels": 4, "problem_type": "multi_label_classification"},
            {"logits": ("multilabel", -1)},
        ),
        ("BertForTokenClassification", {"num_labels": 4}, {"logits": ("classes", -1)}),
        ("BertForMaskedLM", {"output_hidden_states": True}, {"logits": ("classes", -1)}),
        ("BertForQuestionAnswering", {}, {"start_logits": ("values", -1), "end_logits": ("values", -1)}),
        ("BertModel", {}, {"last_hidden_state": ("values", -1), "pooler_output": ("values", -1)}),
    ],
)
def test_what_the_outputs_are(kind: str, options: dict[str, Any], expected: Any) -> None:
    assert parts_of(bert(kind, **options), texts(1)[0]) == expected


def test_a_segmentation_has_its_classes_on_the_second_axis() -> None:
    config = transformers.SegformerConfig(
        num_labels=5, hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1], num_attention_heads=[1, 1, 1, 1],
        decoder_hidden_size=8,
    )  # fmt: skip
    model = transformers.SegformerForSemanticSegmentation(config).eval()
    assert parts_of(model, {"pixel_values": torch.randn(2, 3, 64, 64)}) == {"logits": ("classes", 1)}


@pytest.mark.slow
def test_a_reranker_keeps_what_it_says() -> None:
    model = bert("BertForSequenceClassification", num_labels=1)
    data = texts()
    result = compress(model, data, flops=0.8, search=0, **QUIET)
    assert all(site.loss for site in result.plan.sites if site.linear)
    found = real_loss(model, result.model, data)
    with torch.no_grad():
        a, b = (torch.cat([m(**batch).logits for batch in data]) for m in (model, result.model))
    assert found == pytest.approx(float((a - b).square().mean() / a.square().mean()), rel=0.3)
    assert found > 0


def test_both_ends_of_a_span_are_distilled() -> None:
    """The second head alone is spoilt: the loss sees it, and training brings it back."""
    teacher, student = (bert("BertForQuestionAnswering") for _ in range(2))
    student.load_state_dict(teacher.state_dict())
    with torch.no_grad():
        student.get_parameter("qa_outputs.weight")[1].add_(0.3 * torch.randn(16))
    data = texts()
    before = real_loss(teacher, student, data)
    assert before > 1e-3
    assert set(student(**data[0]).keys()) == {"start_logits", "end_logits"}
    finetune(student, data, teacher=teacher, distill_weight=1.0, epochs=10, lr=1e-2, progress=False)
    assert real_loss(teacher, student, data) < before / 3
    batch = read_batch(teacher, data[0])
    with torch.no_grad():
        terms = distances(batch.run(student), batch.run(teacher), batch)
    assert {name: weight for name, (weight, _) in terms.items()} == {"start_logits": 0.5, "end_logits": 0.5}


@pytest.mark.parametrize(("name", "length"), [("T5", 5), ("T5", 7), ("Bart", 5), ("Marian", 7)])
@pytest.mark.slow
def test_batches_as_collators_make_them(name: str, length: int) -> None:
    sizes = {"vocab_size": 60, "d_model": 16, "decoder_start_token_id": 0, "pad_token_id": 0}
    heads = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    feed = {"encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "max_position_embeddings": 32}
    if name == "T5":
        config = transformers.T5Config(**sizes, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
        model, site = transformers.T5ForConditionalGeneration(config), "decoder.block.0.layer.2.DenseReluDense.act"
    elif name == "Bart":
        config = transformers.BartConfig(**sizes, **heads, **feed)
        model, site = transformers.BartForConditionalGeneration(config), "model.decoder.layers.0.activation_fn"
    else:
        config = transformers.MarianConfig(**sizes, **heads, **feed)
        model, site = transformers.MarianMTModel(config), "model.decoder.layers.0.activation_fn"
    model.eval()
    data = texts(labels=lambda x: x[:, :length].clone())
    for batch in data:
        batch["labels"][:, -2:] = -100
    kept = [{key: value.clone() for key, value in batch.items()} for batch in data]
    sites = calibrate(convert(model, data[0]), data, progress=False).sites
    assert sites[site].count == 6 * 6 * (length - 2), "two targets of each sentence are padding"
    assert next(s.count for n, s in sites.items() if "encoder" in n) == 6 * (3 * 7 + 3 * 5)
    assert parts_of(model, data[0]) == {"logits": ("classes", -1)}
    result = compress(model, data, flops=0.9, finetune={"epochs": 1}, search=0, **QUIET)
    assert result.report.outcome is not None
    for ours, theirs in zip(kept, data, strict=True):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.slow
def test_encodings_become_dicts() -> None:
    model = bert("BertForSequenceClassification", num_labels=3)
    data = [transformers.BatchEncoding(batch) for batch in texts()]
    result = compress(model, data, flops=0.9, search=0, **QUIET)
    assert result.report.outcome is not None
    assert all(set(batch.keys()) == {"input_ids", "attention_mask"} for batch in data)

    class Wrapped(nn.Module):
        """As SentenceTransformer is: a dict in, and the same dict out, with more in it."""

        def __init__(self) -> None:
            super().__init__()
            self.inner = bert("BertModel")

        def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
            features["embedding"] = self.inner(**features).pooler_output
            return features

    wrapped, found = Wrapped().eval(), [(batch,) for batch in data]
    gated = convert(wrapped, found[0])
    counts = {site.count for name, site in calibrate(gated, found, progress=False).sites.items() if "layer" in name}
    assert counts == {6 * (3 * 7 + 3 * 5)}, "padding is left out"
    assert compress(wrapped, found, flops=0.9, search=0, **QUIET).report.outcome is not None
    assert all(set(batch.keys()) == {"input_ids", "attention_mask"} for batch in data)
