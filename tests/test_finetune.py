"""Fine-tuning: it learns, it resumes bitwise, it refuses what it cannot use and leaves the weights alone then."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

from linearize.errors import CheckpointError, DataError, LinearizeError, TrainingError, UsageError
from linearize.finetune import FinetuneResult, finetune
from linearize.gating.gate import ChannelGate, gates
from linearize.running.batches import Batch
from linearize.storage import tensorfile
from linearize.training.divergence import distillation_loss
from linearize.training.features import Features
from linearize.training.priors import SparsityPrior
from linearize.training.state import read_state, write_state

X = torch.randn(192, 6, generator=torch.Generator().manual_seed(0))
Y = (X[:, 0] * X[:, 1] > 0).long()
EPOCHS = 4


def network(seed: int = 0, *, gated: bool = True) -> nn.Sequential:
    torch.manual_seed(seed)
    act = ChannelGate(nn.GELU(), 24) if gated else nn.GELU()
    return nn.Sequential(nn.Linear(6, 24), nn.BatchNorm1d(24), act, nn.Dropout(0.1), nn.Linear(24, 2))


def batches(size: int = 32) -> list[tuple[Tensor, Tensor]]:
    return list(zip(X.split(size), Y.split(size), strict=True))


def plain_loader() -> DataLoader[Any]:
    return DataLoader(TensorDataset(X, Y), 32, shuffle=True)


def loader_with_generator() -> DataLoader[Any]:
    return DataLoader(TensorDataset(X, Y), 32, shuffle=True, generator=torch.Generator().manual_seed(3))


def loader_with_sampler() -> DataLoader[Any]:
    data = TensorDataset(X, Y)
    return DataLoader(data, 32, sampler=RandomSampler(data, generator=torch.Generator().manual_seed(4)))


class Noisy:
    """Data that draws from Python's and NumPy's generators, and knows its epoch."""

    epoch = -1

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return 6

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for x, y in batches():
            noise = random.random() + float(np.random.rand()) + self.epoch  # noqa: S311, NPY002
            yield {"input": x + 0.01 * noise, "labels": y}


def share_of_hits(model: nn.Module) -> float:
    return float((model(X).argmax(-1) == Y).float().mean())


class InterruptedByTestError(Exception):
    pass


def train(model: nn.Module, data: Any, folder: Path, *, stop_after: int = 0, **options: Any) -> FinetuneResult:
    torch.manual_seed(1)

    def stop(record: dict[str, float]) -> None:
        if record["epoch"] == stop_after:
            raise InterruptedByTestError

    prior = SparsityPrior(model, kind="target", target=0.6, steps=EPOCHS * 6, weight=1e-3)
    return finetune(
        model, data, epochs=EPOCHS, prior=prior, checkpoint_dir=folder, on_epoch=stop, evaluate=share_of_hits, **options
    )


@pytest.mark.parametrize("data", [plain_loader, loader_with_generator, loader_with_sampler, Noisy])
@pytest.mark.parametrize("stop_after", [1, 3])
def test_resumes_to_the_same_weights_bitwise(data: Any, stop_after: int, tmp_path: Path) -> None:
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    whole = train(network(), data(), tmp_path / "whole")
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    with pytest.raises(InterruptedByTestError):
        train(network(), data(), tmp_path / "parts", stop_after=stop_after)
    random.seed(5)
    np.random.seed(5)  # noqa: NPY002
    resumed = train(network(seed=7), data(), tmp_path / "parts", resume=True)
    assert resumed.resumed_from == stop_after
    assert resumed.steps == whole.steps == EPOCHS * 6
    expected = whole.model.state_dict()
    for name, tensor in resumed.model.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    without_time = [[{k: v for k, v in r.items() if k != "seconds"} for r in run.history] for run in (whole, resumed)]
    assert without_time[0] == without_time[1]
    assert gates(resumed.model)["2"].linear.sum() == round(0.6 * 24)


def test_checkpoints_are_kept_and_complete(tmp_path: Path) -> None:
    train(network(), batches(), tmp_path, keep=3)
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"epoch-000{n}.safetensors" for n in (2, 3, 4)]
    again = train(network(seed=9), batches(), tmp_path, resume=True)  # nothing left to do
    assert (again.resumed_from, again.steps) == (EPOCHS, EPOCHS * 6)
    assert gates(again.model)["2"].frozen.sum() == round(0.6 * 24)


def test_resume_begins_when_there_is_nothing(tmp_path: Path) -> None:
    assert train(network(), batches(), tmp_path / "new", resume=True).resumed_from == 0


def test_a_run_is_not_mixed_with_another(tmp_path: Path) -> None:
    train(network(), batches(), tmp_path)
    with pytest.raises(UsageError, match="resume=True"):
        train(network(), batches(), tmp_path)
    with pytest.raises(TrainingError, match=r"lr=0\.001 in the checkpoint, but 0\.5"):
        train(network(), batches(), tmp_path, resume=True, lr=0.5)
    other = nn.Sequential(nn.Linear(6, 8), ChannelGate(nn.GELU(), 8), nn.Linear(8, 2))
    with pytest.raises(TrainingError, match="another model"):
        train(other, batches(), tmp_path, resume=True)
    with pytest.raises(UsageError, match="checkpoint_dir"):
        finetune(network(), batches(), resume=True)


@pytest.mark.parametrize("damage", [b"", b"not a file of ours", None])
def test_a_damaged_checkpoint(damage: bytes | None, tmp_path: Path) -> None:
    train(network(), batches(), tmp_path)
    path = tmp_path / f"epoch-000{EPOCHS}.safetensors"
    path.write_bytes(path.read_bytes()[:-100] if damage is None else damage)
    expected = train(network(), batches(), tmp_path / "whole").model.state_dict()
    found = train(network(), batches(), tmp_path, resume=True)
    assert found.resumed_from == EPOCHS - 1
    assert all(torch.equal(value, expected[name]) for name, value in found.model.state_dict().items())


def test_a_failed_write_leaves_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    def fill_disk(record: dict[str, float]) -> None:
        monkeypatch.setattr("os.fsync", full)

    with pytest.raises(CheckpointError, match="No space left"):
        finetune(network(), batches(), epochs=3, checkpoint_dir=tmp_path, on_epoch=fill_disk)
    monkeypatch.undo()
    assert [p.name for p in tmp_path.iterdir()] == ["epoch-0001.safetensors"]
    assert finetune(network(), batches(), epochs=3, checkpoint_dir=tmp_path, resume=True).resumed_from == 1


def test_plain_models_train_too() -> None:
    model = network(gated=False).eval()
    result = finetune(model, batches(), epochs=30, lr=1e-2, evaluate=batches())
    assert result.history[-1]["accuracy"] > 0.9
    assert result.history[-1]["eval_loss"] < result.history[0]["eval_loss"]
    assert not model.training, "the mode it was in"
    assert all(p.grad is None for p in model.parameters())


def test_gates_stay_without_a_prior() -> None:
    model = network()
    nn.init.constant_(gates(model)["2"].alpha, 0.3)
    finetune(model, batches())
    torch.testing.assert_close(gates(model)["2"].alpha.detach(), torch.full((24,), 0.3))


def test_distillation_needs_no_labels_and_leaves_the_teacher() -> None:
    teacher = network(gated=False)
    finetune(teacher, batches(), epochs=10, lr=1e-2)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    student = network(seed=2)
    finetune(student, list(X.split(32)), epochs=30, lr=1e-2, teacher=teacher, distill_weight=1.0)
    agree = student.eval()(X).argmax(-1) == teacher.eval()(X).argmax(-1)
    assert agree.float().mean() > 0.9
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


def test_terms_of_the_loss_add_up() -> None:
    model = network()
    record = finetune(
        model, batches(), teacher=network(seed=1), distill_weight=0.25, prior=SparsityPrior(model, weight=0.1)
    ).history[0]
    assert record["loss"] == pytest.approx(record["task"] + record["distill"] + record["prior"], rel=1e-5)
    assert record["prior"] == pytest.approx(2.4, rel=0.1)


def test_features_inside_become_the_teachers() -> None:
    student, teacher = network(seed=0), network(seed=1)
    apart = [(student[1](student[0](X)) - teacher[1](teacher[0](X))).square().mean()]
    options: dict[str, Any] = {"teacher": teacher, "distill_weight": 0.5, "lr": 1e-2, "progress": False}
    result = finetune(student, batches(), epochs=20, features=["1"], feature_weight=2.0, **options)
    apart.append((student[1](student[0](X)) - teacher[1](teacher[0](X))).square().mean())
    assert apart[1] < 0.2 * apart[0]
    first, last = result.history[0], result.history[-1]
    assert last["features"] < 0.5 * first["features"]
    assert first["loss"] == pytest.approx(first["task"] + first["distill"] + first["features"], rel=1e-5)
    assert not any(module._forward_hooks for model in (student, teacher) for module in model.modules())


def test_features_alone_leave_padding_out() -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.last = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
            return self.last(self.inner(x))

    torch.manual_seed(0)
    student, teacher = Tokens(), Tokens()
    x, mask = torch.randn(3, 5, 4), (torch.arange(5) < torch.tensor([[5], [2], [3]])).long()
    features = Features(student, teacher, "inner")
    batch = Batch((), {"x": x, "attention_mask": mask})
    with features.watching():
        student(x, mask), teacher(x, mask)
        found = features.loss(batch)
        a, b = (model.inner(x)[mask.bool()] for model in (student, teacher))
    torch.testing.assert_close(found, (a - b).square().mean() / b.square().mean())


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"features": "1"}, "found no teacher"),
        ({"features": "zzz*", "teacher": True}, "names no module of model and teacher"),
        ({"features": "0", "teacher": True, "feature_weight": 0.0}, "feature_weight: found 0.0"),
    ],
)
def test_features_that_cannot_be_learned(options: dict[str, Any], match: str) -> None:
    if "teacher" in options:
        options = {**options, "teacher": network(seed=1)}
    with pytest.raises(UsageError, match=match):
        finetune(network(seed=0), batches(), progress=False, **options)
    narrow = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2))
    with pytest.raises(TrainingError, match=r"0 gives .* the teacher's"):
        finetune(narrow, batches(), teacher=network(seed=1), features="0", progress=False)


def test_distillation_loss_by_hand() -> None:
    student, teacher = torch.randn(4, 3), torch.randn(4, 3)
    batch = Batch((student,), {}, torch.zeros(4, dtype=torch.long))
    p, q = ((z / 3).softmax(-1) for z in (teacher, student))
    expected = 9 * (p * (p / q).log()).sum(-1).mean()
    torch.testing.assert_close(distillation_loss(student, teacher, batch, temperature=3.0), expected)
    relative = (student - teacher).square().sum() / teacher.square().sum()
    torch.testing.assert_close(distillation_loss(student, teacher, Batch((student,))), relative)


def test_distillation_leaves_padding_out() -> None:
    student, teacher = torch.randn(2, 3, 5), torch.randn(2, 3, 5)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    batch = Batch((), {"attention_mask": mask})
    value = distillation_loss(student, teacher, batch)
    teacher = teacher.where(mask.bool()[..., None], 7.0)
    torch.testing.assert_close(distillation_loss(student, teacher, batch), value)


def test_mixed_precision_keeps_the_weights() -> None:
    model = network()
    prior = SparsityPrior(model, kind="target", target=0.5, steps=12)
    result = finetune(model, batches(), epochs=2, prior=prior, mixed_precision="bf16")
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert result.history[-1]["share"] == 0.5
    assert "forward" not in vars(model), "accelerate's wrapper stays behind"
    finetune(model, batches())  # and back, in the same process


def test_a_loss_of_ones_own() -> None:
    model = nn.Linear(6, 1)
    data = [(x, x.sum(1, keepdim=True)) for x in X.split(16)]
    result = finetune(model, data, epochs=40, lr=0.05, loss=lambda output, y: (output - y).square().mean())
    assert result.history[-1]["loss"] < 0.01


def test_models_that_compute_their_loss() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(6, 2)

        def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
            logits = self.head(x)
            found = {"logits": logits}
            return found if labels is None else {"loss": nn.functional.cross_entropy(logits, labels) + 5} | found

    result = finetune(Own(), [{"x": X, "labels": Y}], evaluate=[{"x": X, "labels": Y}])
    assert result.history[0]["task"] > 5
    assert result.history[0]["accuracy"] > 0.2


def test_sequences_of_labels() -> None:
    model = nn.Sequential(nn.Embedding(9, 16), nn.Linear(16, 9))
    ids = torch.randint(0, 9, (4, 7))
    labels = ids.masked_fill(torch.arange(7) > 4, -100)
    record = finetune(model, [(ids, labels)] * 40, lr=0.05, weight_decay=0.0, evaluate=[(ids, labels)]).history[0]
    assert record["accuracy"] == 1


def test_weights_are_those_before_a_bad_step() -> None:
    model = network(gated=False)
    good = batches()[0]
    bad = (torch.full_like(X[:32], float("nan")), Y[:32])
    expected = network(gated=False)
    torch.manual_seed(0)
    finetune(expected, [good], lr=0.1, epochs=1, warmup=0.0)
    torch.manual_seed(0)
    with pytest.raises(TrainingError, match=r"step 2: found a task loss of nan"):
        finetune(model, [good, bad], lr=0.1, epochs=1, warmup=0.0)
    for mine, its in zip(model.parameters(), expected.parameters(), strict=True):
        assert torch.equal(mine, its)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda output, y: output, "tensor of shape"),
        (lambda output, y: 3.0, "float"),
        (lambda output, y: output.sum() * float("inf"), "inf|nan"),
        (lambda output, y: output.detach().sum(), "no trainable parameter"),
    ],
)
def test_bad_losses(loss: Any, message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        finetune(network(gated=False), batches(), loss=loss)


def test_gradients_that_are_not_finite() -> None:
    model = nn.Linear(6, 1)
    with pytest.raises(TrainingError, match="gradients"):
        finetune(model, [X], loss=lambda output, _: (output * 0).abs().sqrt().sum())


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        ([], DataError, "no batches"),
        ((b for b in batches()), UsageError, "steps_per_epoch"),
        ([X], DataError, "no labels"),
        ([(X, Y[:5])], DataError, r"labels \(5,\)"),
        ([3], DataError, "type int"),
    ],
)
def test_bad_data(data: Any, error: type[LinearizeError], message: str) -> None:
    with pytest.raises(error, match=message):
        finetune(network(gated=False), data)


def test_data_that_runs_out() -> None:
    once = iter(batches())
    with pytest.raises(DataError, match="found 0 batches in epoch 2 instead of 6"):
        finetune(network(gated=False), once, steps_per_epoch=6, epochs=2)
    assert finetune(network(gated=False), batches(), steps_per_epoch=2, epochs=3).steps == 6


@pytest.mark.parametrize(
    "options",
    [
        {"epochs": 0},
        {"distill_weight": 1.5},
        {"warmup": -0.1},
        {"keep": 0},
        {"mixed_precision": "int4"},
        {"steps_per_epoch": 0},
        {"lr": -1.0},
    ],
    ids=str,
)
def test_bad_options(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        finetune(network(gated=False), batches(), **options)


def test_a_prior_that_does_not_fit() -> None:
    model = network()
    with pytest.raises(UsageError, match="at step 100, but 6 steps"):
        finetune(model, batches(), prior=SparsityPrior(model, kind="target", target=0.5, steps=100))
    with pytest.raises(UsageError, match="another model"):
        finetune(model, batches(), prior=SparsityPrior(network()))


def test_training_state_round_trip(tmp_path: Path) -> None:
    weight = torch.randn(3, 2)
    state = {
        "a": [1, 2.5, None, True, "text", (1, (2.0, 3))],
        7: {"tied": [weight, weight], "view": weight.t(), "half": weight.bfloat16(), "none": torch.zeros(0)},
        "bytes": torch.arange(5, dtype=torch.uint8),
        "nan": float("nan"),
        "inf": float("inf"),
    }
    write_state(tmp_path / "state.safetensors", state)
    found = read_state(tmp_path / "state.safetensors")
    assert found["a"] == state["a"]
    assert torch.equal(found[7]["view"], weight.t())
    assert torch.equal(found[7]["tied"][1], weight)
    assert found[7]["half"].dtype == torch.bfloat16
    assert found[7]["none"].shape == (0,)
    assert np.isnan(found["nan"])
    assert found["inf"] == float("inf")
    with pytest.raises(TypeError, match="object"):
        write_state(tmp_path / "bad.safetensors", {"x": object()})
    tensorfile.write_tensors(tmp_path / "newer.safetensors", {}, {"format": "linearize-training", "version": "9"})
    with pytest.raises(CheckpointError, match="version '9'"):
        read_state(tmp_path / "newer.safetensors")
