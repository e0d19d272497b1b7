"""Batches belong to the user: copies for every call, plain containers, masks wherever they are, clear refusals."""

from __future__ import annotations

import copy
from collections import UserDict, namedtuple
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.data import DataLoader, IterableDataset

from linearize import (
    DataError,
    UsageError,
    benchmark,
    calibrate,
    collapse,
    compress,
    convert,
    finetune,
    gates,
    summary,
    verify,
)
from linearize.cost import cost
from linearize.nest import copied, leaves_of, mapped, plain_nest
from linearize.planning.first_batches import some_batches
from linearize.planning.timing.in_place import shares_in_place
from linearize.running.batches import ReadData, count_of, length_of, read_batch
from linearize.training.distance import real_loss, some_of
from linearize.training.losses import evaluate_batches, scores_of
from tests.toys import QUIET

Pair = namedtuple("Pair", ["x", "y"])


class InPlace(nn.Module):
    """Overwrites its input, as normalising code does; every later call on it sees something else."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 48), nn.GELU(), nn.Linear(48, 3))

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.net(x.mul_(0.5).add_(1.0))
        return found


class Writing(nn.Module):
    """Takes a dict, and writes its results into it; what is there already is returned as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(8, 48), nn.GELU(), nn.Linear(48, 3))

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        if "embedding" not in features:
            features["embedding"] = self.inner(features["x"])
        return features


def data(count: int = 6, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(32, 8, generator=generator) for _ in range(count)]


def test_nests_are_mapped_with_their_classes() -> None:
    @dataclass(frozen=True)
    class Frozen:
        a: Any

    nest: list[Any] = [UserDict(k=(1, 2)), Pair(3, Frozen([4])), {"n": None}]
    found = mapped(nest, lambda value: value and value * 10)
    assert found == [{"k": (10, 20)}, Pair(30, Frozen([40])), {"n": None}]
    assert type(found[0]) is dict
    assert nest[1].y.a == [4], "the one that was given is another"
    assert [name for name, _ in leaves_of(nest)] == ["0.k.0", "0.k.1", "1.0", "1.1.a.0", "2.n"]


def test_copies_share_nothing_but_what_cannot_be_copied() -> None:
    class Cache:
        def __init__(self) -> None:
            self.seen = [torch.zeros(2)]

    x, cache, lines = torch.ones(2, requires_grad=True), Cache(), (line for line in "ab")
    twin = copied({"x": x, "same": [x], "cache": cache, "lines": lines, "f": torch.relu})
    assert twin["x"] is twin["same"][0]
    assert not twin["x"].requires_grad
    twin["x"].add_(1)
    twin["cache"].seen[0].add_(1)
    assert x.tolist() == [1, 1]
    assert cache.seen[0].tolist() == [0, 0]
    assert twin["lines"] is lines
    assert twin["f"] is torch.relu


@pytest.mark.parametrize("labels", [False, True])
def test_a_model_that_overwrites_its_input_is_compared_with_the_user_s_data(labels: bool) -> None:
    model, batches = InPlace().eval(), data()
    some: list[Any] = [(x, torch.arange(32) % 3) for x in batches] if labels else list(batches)
    kept = copy.deepcopy(some)
    options: dict[str, Any] = {"finetune": {"epochs": 1}, "evaluate": some} if labels else {}
    result = compress(model, some, flops=0.6, **options, **QUIET)
    for ours, theirs in zip(leaves_of(kept), leaves_of(some), strict=True):
        assert torch.equal(ours[1], theirs[1]), ours[0]
    with torch.no_grad():
        a, b = ([m(x.clone()) for x in batches] for m in (model, result.model))
    true = [float((q - p).square().sum() / p.square().sum()) for p, q in zip(a, b, strict=True)]
    assert min(true) > 1e-6
    if not labels:
        assert real_loss(model, result.model, some) == pytest.approx(sum(true) / len(true), rel=1e-4)


def test_every_verb_leaves_the_inputs_as_they_are() -> None:
    model, x = InPlace().eval(), data(1)[0]
    kept = x.clone()
    gated = convert(model, x)
    calibrate(gated, [x, x], progress=False)
    gates(gated)["net.1"].linearize_(torch.arange(48) < 30)
    small = collapse(gated)
    assert verify(gated, small, x).passed
    assert not verify(model, small, x).passed
    summary(model, x)
    cost(model, x)
    assert torch.equal(x, kept)
    student = convert(model, x)
    finetune(student, [x] * 3, teacher=model, distill_weight=1.0, features="net.0", progress=False)
    assert torch.equal(x, kept)


class Depends(nn.Module):
    """Its control flow depends on the values, so that no graph of all of it can be captured."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))

    def forward(self, x: Tensor, note: dict[str, Any]) -> Tensor:
        note["seen"] = x.mul_(0.5)
        out: Tensor = self.mlp(x) if x.sum() > 0 else self.mlp(-x)
        return out


def test_dry_runs_leave_the_inputs_as_they_are() -> None:
    x, note = data(1)[0], {"one": torch.ones(1)}
    kept = x.clone()
    gated = convert(Depends(), (x, note))
    assert torch.equal(x, kept)
    assert list(note) == ["one"]
    calibrate(gated, [{"x": x, "note": UserDict(note)}], progress=False)
    assert torch.equal(x, kept)
    assert list(note) == ["one"]


@pytest.mark.parametrize("kind", [dict, UserDict])
def test_a_model_that_writes_into_its_dict_is_not_compared_with_itself(kind: Any) -> None:
    model = Writing().eval()
    batches = [(kind(x=x),) for x in data()]
    result = compress(model, batches, flops=0.6, output="embedding", **QUIET)
    assert all(site.loss for site in result.plan.sites)
    with torch.no_grad():
        a, b = (m({"x": batches[0][0]["x"]})["embedding"] for m in (model, result.model))
    assert 1e-6 < float((a - b).square().sum() / a.square().sum()) < 0.5
    for (batch,) in batches:
        assert list(batch) == ["x"]
        assert not isinstance(batch["x"], FakeTensor)


def test_inputs_of_other_mappings_can_be_converted() -> None:
    model, x = Writing().eval(), data(1)[0]
    batch = UserDict(x=x)
    gated = convert(model, (batch,))
    assert list(batch) == ["x"]
    assert verify(model, gated, (UserDict(x=x),)).passed


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 5))

    def forward(self, batch: dict[str, Any]) -> Tensor:
        out: Tensor = self.net(batch["text"]["x"])
        return out


def test_masks_are_found_in_nested_dicts() -> None:
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    batches = [({"text": UserDict(x=torch.randn(2, 3, 5), attention_mask=mask)},) for _ in range(4)]
    model = convert(Masked(), batches[0])
    assert calibrate(model, batches, progress=False).sites["net.1"].count == 4 * 3
    assert read_batch(model, batches[0]).size == 2
    other = Masked()
    with torch.no_grad():
        a, b = (torch.stack([m(plain_nest(batch[0]))[mask.bool()] for batch in batches]) for m in (model, other))
    by_hand = [float((q - p).square().sum() / p.square().sum()) for p, q in zip(a, b, strict=True)]
    assert real_loss(model, other, batches) == pytest.approx(sum(by_hand) / 4, rel=1e-5)


@pytest.mark.parametrize(
    ("batch", "match"),
    [
        (np.zeros((4, 8), dtype=np.float32), "an array of NumPy in a batch. Yield tensors"),
        ((torch.zeros(4, 8), np.zeros(4)), "an array of NumPy in a batch, at 1"),
        ({"x": {"deep": np.zeros(4)}}, "an array of NumPy in a batch, at x.deep"),
        (torch.zeros(4, 8).to_sparse(), "layout sparse_coo .*to_dense"),
        (torch.nested.nested_tensor([torch.zeros(3, 8)], layout=torch.jagged), "a nested tensor"),
        (torch.zeros(4, 8, device="meta"), "a tensor without values"),
        ((), "without entries"),
        (3, "a batch of type int"),
    ],
)
def test_batches_that_no_model_can_be_given(batch: Any, match: str) -> None:
    net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
    for call in (
        lambda: compress(net, [batch] * 3, flops=0.6, **QUIET),
        lambda: finetune(net, [batch] * 3, progress=False),
        lambda: calibrate(convert(net, torch.zeros(4, 8)), [batch], progress=False),
        lambda: evaluate_batches(net, [batch]),
    ):
        with pytest.raises(DataError, match=match):
            call()


class Stream(IterableDataset[Tensor]):
    def __iter__(self) -> Iterator[Tensor]:
        return iter(torch.cat(data(3)))


class Endless:
    def __iter__(self) -> Iterator[Tensor]:
        while True:
            yield torch.zeros(4, 8)


def test_loaders_of_iterable_data_sets() -> None:
    loader = DataLoader(Stream(), batch_size=32)
    assert length_of(loader) is None
    assert count_of(loader) == 3
    net = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 4))
    assert compress(net, loader, flops=0.7, finetune={"epochs": 1, "distill_weight": 1.0}, **QUIET).report.history
    with pytest.raises(UsageError, match="without a length"):
        finetune(net, loader, teacher=net, distill_weight=1.0, progress=False)
    assert len(some_of(ReadData(net, loader), 2)) == 2


def test_data_without_an_end() -> None:
    net = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 4))
    with pytest.raises(DataError, match="no length, and more than 10000 batches"):
        count_of(Endless())
    with pytest.raises(DataError, match="no length, and more than 10000 batches"):
        compress(net, Endless(), flops=0.7, **QUIET)


@pytest.mark.parametrize("found", [None, "good", [1.0], {"accuracy": None}, torch.ones(2)])
def test_evaluations_that_give_no_number(found: Any) -> None:
    with pytest.raises(UsageError, match="evaluate: found a function that gives"):
        scores_of(nn.Linear(2, 2), lambda _: found)


def test_a_batch_that_training_cannot_take_is_told() -> None:
    net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
    good, bad = (torch.zeros(4, 8), torch.tensor([0, 1, 0, 1])), (torch.zeros(4, 9), torch.tensor([0, 1, 0, 1]))
    with pytest.raises(DataError, match="batch 1 does not go through the model"):
        finetune(net, [good, bad], progress=False)


def test_images_without_a_batch_axis() -> None:
    net = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 4, 3, padding=1))
    images = [torch.randn(3, 9, 9) for _ in range(12)]
    single = compress(net, images, flops=0.6, modules=False, **QUIET)
    batched = compress(net, [image[None] for image in images], flops=0.6, modules=False, **QUIET)
    assert [site.loss for site in single.plan.sites] == pytest.approx([s.loss for s in batched.plan.sites], rel=1e-4)
    assert single.model(images[0]).shape == (4, 9, 9)


class Translator(nn.Module):
    """A toy of a sequence-to-sequence model: the decoder's input is made of the labels, if it is not given."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(20, 8)
        self.encoder = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
        self.decoder = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
        self.head = nn.Linear(8, 20)

    def prepare_decoder_input_ids_from_labels(self, labels: Tensor) -> Tensor:
        return nn.functional.pad(labels[:, :-1].clamp(min=0), (1, 0))

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, decoder_input_ids: Any = None, labels: Any = None
    ) -> dict[str, Tensor]:
        if decoder_input_ids is None:
            decoder_input_ids = self.prepare_decoder_input_ids_from_labels(labels)
        weights = attention_mask[..., None] / attention_mask.sum(1)[:, None, None]
        context = (self.encoder(self.words(input_ids)) * weights).sum(1, keepdim=True)
        logits = self.head(self.decoder(self.words(decoder_input_ids) + context))
        if labels is None:
            return {"logits": logits}
        return {"loss": nn.functional.cross_entropy(logits.transpose(1, 2), labels), "logits": logits}


def pairs(source: int, target: int, count: int = 6) -> list[dict[str, Tensor]]:
    """As collators make them: 4 sentences, of which each has two words less in the source and one in the target."""
    generator, found = torch.Generator().manual_seed(0), []
    for _ in range(count):
        ids, labels = (torch.randint(1, 20, (4, n), generator=generator) for n in (source, target))
        mask = torch.ones_like(ids)
        mask[:, -2:] = 0
        labels[:, -1:] = -100
        found.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return found


@pytest.mark.parametrize("target", [5, 7])
def test_labels_that_are_inputs(target: int) -> None:
    batches = pairs(7, target)
    model = Translator().eval()
    gated = convert(model, batches[0])
    counts = {name: site.count for name, site in calibrate(gated, batches, progress=False).sites.items()}
    assert counts == {"encoder.1": 6 * 4 * 5, "decoder.1": 6 * 4 * (target - 1)}, "each has the padding of its own"
    result = compress(model, batches, flops=0.8, finetune={"epochs": 1}, evaluate=batches, **QUIET)
    assert result.report.outcome is not None
    assert result.report.quality["accuracy"].keys() == {"before", "gated", "collapsed"}
    assert [set(batch) for batch in batches] == [{"input_ids", "attention_mask", "labels"}] * 6


def test_padding_of_targets_counts_for_nothing() -> None:
    batches = pairs(7, 7)
    model, other = Translator().eval(), Translator().eval()
    found = real_loss(model, other, batches)
    with torch.no_grad():
        p, q = (torch.cat([m(**b)["logits"][:, :-1] for b in batches]).softmax(-1) for m in (model, other))
    assert found == pytest.approx(float((p * (p / q).log()).sum(-1).mean()), rel=1e-4)
    labels = [{**batch, "labels": batch["labels"].masked_fill(batch["labels"] == -100, 3)} for batch in batches]
    assert real_loss(model, other, labels) != found


def test_labels_without_which_a_model_does_not_run() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(8, 48), nn.ReLU(), nn.Linear(48, 2))

        def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
            if labels is None:
                raise ValueError("what shall I learn?")
            out: Tensor = self.net(x + labels[:, None])
            return out

    class Plain(Own):
        def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
            out: Tensor = self.net(x)
            return out

    batches = [{"x": x, "labels": torch.arange(32) % 2} for x in data()]
    assert set(some_batches(Own(), batches)[0]) == {"x", "labels"}
    assert set(some_batches(Plain(), batches)[0]) == {"x"}
    assert compress(Own().eval(), batches, flops=0.7, **QUIET).report.outcome is not None


def test_given_inputs_of_the_decoder_are_taken() -> None:
    batch = pairs(7, 5)[0]
    given = {**batch, "decoder_input_ids": torch.ones(4, 5, dtype=torch.long)}
    assert "labels" not in some_batches(Translator(), [given])[0]
    assert "labels" in some_batches(Translator(), [batch])[0]
    for some in (batch, given):  # collators that know the model give both
        masks = read_batch(Translator(), some).masks or {}
        assert torch.equal(masks["decoder_attention_mask"], batch["labels"] != -100)


def test_a_decoder_is_not_masked_by_its_encoder() -> None:
    batches = [{**batch, "decoder_input_ids": torch.ones(4, 7, dtype=torch.long)} for batch in pairs(7, 7)]
    for batch in batches:
        del batch["labels"]
    model, other = Translator().eval(), Translator().eval()
    counts = {name: s.count for name, s in calibrate(convert(model, batches[0]), batches, progress=False).sites.items()}
    assert counts == {"encoder.1": 6 * 4 * 5, "decoder.1": 6 * 4 * 7}
    with torch.no_grad():
        a, b = (torch.stack([m(**batch)["logits"] for batch in batches]) for m in (model, other))
    by_hand = [float((q - p).square().sum() / p.square().sum()) for p, q in zip(a, b, strict=True)]
    assert real_loss(model, other, batches) == pytest.approx(sum(by_hand) / 6, rel=1e-5)


def test_plain_batches_are_new_containers() -> None:
    inner = {"a": torch.ones(1)}
    outer = UserDict(inner=inner)
    found = plain_nest(outer)
    found["inner"]["b"] = 1
    assert list(inner) == ["a"]


def test_timings_of_models_that_change_their_inputs() -> None:
    """A run on what an earlier one has left would find the result there, and do nothing."""
    calls = []

    class Counting(Writing):
        def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
            calls.append("embedding" in features)
            return super().forward(features)

    x = data(1)[0]
    benchmark((Counting().eval(), Counting().eval()), ({"x": x},), rounds=2, warmup=1)
    assert len(calls) > 8
    assert not any(calls)
    seen: list[Tensor] = []
    model = InPlace().eval()
    model.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    benchmark((model, model), x, rounds=2, warmup=1)
    shares_in_place(model, x, [32], {"all": ["net"]}, rounds=1)
    assert all(torch.equal(given, x) for given in seen)


def test_a_cache_that_is_an_input_keeps_its_values() -> None:
    class Store:
        def __init__(self) -> None:
            self.held = [torch.ones(1)]

    class Remembering(InPlace):
        def forward(self, x: Tensor, store: Store | None = None) -> Tensor:
            out = super().forward(x)
            if store is not None:
                store.held.append(out)
            return out

    store = Store()
    gated = convert(Remembering(), {"x": data(1)[0], "store": store})
    assert len(store.held) == 1
    calibrate(gated, [{"x": x, "store": store} for x in data()], progress=False)
    assert len(store.held) == 1
