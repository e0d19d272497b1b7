"""What an output consists of, what is taken for classes, and the one distance built on it."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - as everywhere

from linearize import DataError, LinearizeError, TrainingError, UsageError, compress, finetune
from linearize.cli import run
from linearize.running.batches import Batch
from linearize.running.outputs import OutputMeaning, main_part, tensors_in
from linearize.running.targets import fitted
from linearize.training.divergence import distances, distillation_loss
from linearize.training.losses import evaluate_batches, task_loss
from linearize.training.probes import projection
from tests.toys import QUIET


@dataclass
class Detections:
    boxes: Tensor
    aux: dict[str, Tensor] = field(default_factory=dict)
    count: int = 3


def configured(**config: Any) -> nn.Module:
    model = nn.Linear(2, 2)
    model.config = SimpleNamespace(**config)  # type: ignore[assignment]
    return model


def test_every_floating_tensor_is_a_part() -> None:
    one = torch.ones(2, 3)
    output = (one, {"mask": one.bool(), "maps": [one, one * 2j]}, Detections(one, {"depth": one}), None, "text")
    assert list(tensors_in(output)) == ["0", "1.maps.0", "1.maps.1", "2.boxes", "2.aux.depth"]
    assert list(tensors_in(SimpleNamespace(start=one, end=one))) == ["start", "end"]
    assert list(tensors_in([Detections(one), Detections(one)])) == ["*.boxes"]
    assert list(tensors_in([one, one])) == ["0", "1"], "a pyramid has levels, each of its own"
    with pytest.raises(TrainingError, match="no floating tensor"):
        OutputMeaning().parts({"ids": torch.ones(2, dtype=torch.long)})


def test_what_is_inside_counts_only_if_it_is_chosen() -> None:
    z = torch.ones(2, 3)
    output = {"loss": torch.tensor(1.0), "logits": z, "hidden_states": (z, z), "router_loss": z, "past_key_values": z}
    assert [part.name for part in OutputMeaning().parts(output)] == ["logits"]
    chosen = OutputMeaning.of(nn.Identity(), ["hidden_states", "logits"]).parts(output)
    assert [part.name for part in chosen] == ["logits", "hidden_states.0", "hidden_states.1"]
    assert [part.name for part in OutputMeaning().parts({"hidden_states": (z,)})] == ["hidden_states.0"]
    told = OutputMeaning.of(configured(keys_to_ignore_at_inference=["memory"]))
    assert [part.name for part in told.parts({"logits": z, "memory": z})] == ["logits"]


@pytest.mark.parametrize("choice", ["lo", [], {"logits": 0}, {"logits": -1.0}, {"logits": "labels"}, {}, 3, [2]])
def test_choices_that_name_nothing(choice: Any) -> None:
    with pytest.raises(UsageError, match=r"output: found .*(Its parts are logits|Pass patterns)"):
        OutputMeaning.of(nn.Identity(), choice).parts({"logits": torch.ones(2, 3)})


@pytest.mark.parametrize(
    ("shape", "labels", "expected"),
    [
        ((4, 3), torch.tensor([0, 2, 1, -100]), ("classes", -1)),
        ((4, 5, 3), torch.zeros(4, 5, dtype=torch.long), ("classes", -1)),
        ((4, 3, 5), torch.zeros(4, 5, dtype=torch.long), ("classes", 1)),
        ((4, 3, 8, 9), torch.zeros(4, 8, 9, dtype=torch.long), ("classes", 1)),
        ((4, 8, 8, 8), torch.zeros(4, 8, 8, dtype=torch.long), ("classes", 1)),
        ((4, 8, 9, 3), torch.zeros(4, 8, 9, dtype=torch.uint8), ("classes", -1)),
        ((4, 3, 8, 8), torch.rand(4, 3, 8, 8).softmax(1), ("classes", 1)),
        ((4, 3), torch.rand(4, 3).softmax(-1), ("classes", -1)),
        ((4, 3), torch.tensor([[1.0, 1, 0], [0, 0, 0], [0, 1, 0], [1, 1, 1]]), ("multilabel", -1)),
        ((4, 1, 8, 8), (torch.rand(4, 1, 8, 8) > 0.5).float(), ("multilabel", -1)),
        ((4, 1), torch.tensor([[1], [0], [1], [1]]), ("multilabel", -1)),
        ((4, 1), torch.ones(4, 1), ("values", -1)),
        ((4, 1), torch.tensor([3, 1, 4, 1]), ("values", -1)),
        ((4, 1), torch.rand(4), ("values", -1)),
        ((4, 3, 8, 8), torch.rand(4, 3, 8, 8), ("values", -1)),
        ((4, 3), torch.rand(4), None),
        ((4, 3), torch.zeros(5, dtype=torch.long), None),
        ((4, 1), torch.zeros(4, 2, dtype=torch.long), None),
    ],
)
def test_labels_say_what_an_output_is(shape: tuple[int, ...], labels: Tensor, expected: Any) -> None:
    assert fitted(torch.randn(shape) * 3, labels) == expected


def test_probabilities_are_no_logits_of_labels() -> None:
    labels = (torch.rand(8, 5) > 0.5).float()
    assert fitted(torch.rand(8, 5), labels) == ("values", -1)


@pytest.mark.parametrize(
    ("config", "shape", "labels", "expected"),
    [
        ({"num_labels": 1, "problem_type": None}, (4, 1), None, "values"),
        ({"num_labels": 1, "problem_type": "regression"}, (4, 1), None, "values"),
        ({"num_labels": 3, "problem_type": "regression"}, (4, 3), None, "values"),
        ({"num_labels": 3, "problem_type": None}, (4, 3), None, "classes"),
        ({"num_labels": 3, "problem_type": "multi_label_classification"}, (4, 3), None, "multilabel"),
        ({"num_labels": 3, "problem_type": "single_label_classification"}, (4, 3), None, "classes"),
        ({"num_labels": 3, "problem_type": None}, (4, 3), torch.eye(4, 3), "multilabel"),
        ({"num_labels": 2, "vocab_size": 50}, (4, 7, 50), None, "classes"),
        ({"num_labels": 2, "vocab_size": 50}, (4, 7, 48), None, "values"),  # pixels that are called logits
        ({"num_labels": 4}, (2, 9, 5), None, "classes"),  # or none of these
        ({"num_labels": 4}, (2, 4, 8, 8), None, "classes"),
        ({"num_labels": 4}, (2, 4, 7), None, "values"),  # four positions
        ({}, (4, 3), None, "values"),
        ({}, (4, 3), torch.tensor([0, 1, 2, 0]), "classes"),
    ],
)
def test_a_configuration_says_what_logits_are(
    config: dict[str, Any], shape: tuple[int, ...], labels: Tensor | None, expected: str
) -> None:
    (part,) = OutputMeaning.of(configured(**config)).parts({"logits": torch.randn(shape)}, labels)
    assert part.kind == expected
    (other,) = OutputMeaning.of(configured(**config)).parts({"features": torch.randn(shape)})
    assert other.kind == "values", "by another name it may be anything"


def test_nested_configurations_know_the_words() -> None:
    inner = type("Config", (), {"to_dict": lambda _: {}})()
    inner.vocab_size = 50
    (part,) = OutputMeaning.of(configured(text_config=inner)).parts({"logits": torch.randn(2, 3, 50)})
    assert (part.kind, part.axis) == ("classes", -1)


def test_the_user_has_the_last_word() -> None:
    z, y = torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
    for kind in ("classes", "multilabel", "values"):
        (part,) = OutputMeaning.of(configured(num_labels=3), {"logits": kind}).parts({"logits": z}, y)
        assert part.kind == kind


def test_labels_belong_to_the_logits_or_the_first_part_that_they_fit() -> None:
    y = torch.tensor([0, 1, 2, 0])
    output = {"features": torch.randn(4, 16), "logits": torch.randn(4, 3), "aux": torch.randn(4, 3)}
    kinds = {part.name: part.kind for part in OutputMeaning().parts(output, y)}
    assert kinds == {"features": "values", "logits": "classes", "aux": "classes"}
    torch.testing.assert_close(task_loss(output, y), F.cross_entropy(output["logits"], y))
    assert task_loss({"output": output["logits"]}, {"output": y}) == task_loss(output, y)
    named = {"logits": y, "features": torch.randn(4, 16)}
    expected = (F.cross_entropy(output["logits"], y) + ratio(output["features"], named["features"])) / 2
    torch.testing.assert_close(task_loss(output, named), expected)


def ratio(a: Tensor, b: Tensor) -> Tensor:
    return (a - b).square().sum() / b.square().sum()


def test_task_losses_by_hand() -> None:
    z = torch.randn(4, 3, 5, 6)
    y = torch.randint(0, 3, (4, 5, 6))
    y[0, 0] = -100
    torch.testing.assert_close(task_loss(z, y), F.cross_entropy(z, y))
    mixed = torch.rand(4, 3, 5, 6).softmax(1)
    torch.testing.assert_close(task_loss(z, mixed), F.cross_entropy(z, mixed))
    hot = (torch.rand(4, 3) > 0.5).float()
    flat = torch.randn(4, 3)
    torch.testing.assert_close(task_loss(flat, hot), F.binary_cross_entropy_with_logits(flat, hot))
    target = torch.randn(4, 3, 5, 6)
    torch.testing.assert_close(task_loss(z, target), ratio(z, target))
    torch.testing.assert_close(task_loss(flat[:, :1], target[:, 0, 0, 0]), ratio(flat[:, 0], target[:, 0, 0, 0]))


@pytest.mark.parametrize(
    ("labels", "match"),
    [
        (torch.tensor([0, 1, 9]), "found the label 9 for 4 classes. Classes are 0 to 3; -100 marks"),
        (torch.tensor([0, -1, 2]), "found the label -1 for 4 classes"),
        (torch.rand(3), r"found float32 labels \(3,\) for .* \(3, 4\). If they are classes, pass labels.long"),
        (torch.zeros(5, dtype=torch.long), r"found int64 labels \(5,\)"),
        ("cat", "found labels of type str"),
        ({"other": torch.zeros(3)}, r"found labels of type dict \(other\)"),
        (
            {"output": torch.tensor([0, 1, 2]), "uotput": torch.zeros(3)},
            r"found labels of type dict \(output, uotput\)",
        ),
        (None, "found no labels"),
    ],
)
def testlabelsthat_do_not_fit(labels: Any, match: str) -> None:
    with pytest.raises(DataError, match=match):
        task_loss(torch.randn(3, 4), labels)


def test_distances_by_hand() -> None:
    a, b = ({"logits": torch.randn(4, 3), "boxes": torch.randn(4, 6), "tags": torch.randn(4, 5)} for _ in range(2))
    model = configured(num_labels=3)
    batch = Batch(meaning=OutputMeaning.of(model, {"logits": 2, "boxes": 1.0, "tags": "multilabel"}))
    p, q = (z["logits"].softmax(-1) for z in (b, a))
    s, t = (z["tags"].sigmoid() for z in (a, b))
    expected = {
        "logits": (0.5, (p * (p / q).log()).sum(-1).mean()),
        "boxes": (0.25, ratio(a["boxes"], b["boxes"])),
        "tags": (0.25, (t * (t / s).log() + (1 - t) * ((1 - t) / (1 - s)).log()).mean()),
    }
    found = distances(a, b, batch)
    assert found.keys() == expected.keys()
    for name, (weight, value) in expected.items():
        assert found[name][0] == pytest.approx(weight)
        torch.testing.assert_close(found[name][1], value)
    whole = sum(weight * value for weight, value in expected.values())
    torch.testing.assert_close(distillation_loss(a, b, batch, 1.0), whole)
    shuffled = {name: a[name] for name in reversed(a)}
    torch.testing.assert_close(distillation_loss(shuffled, b, batch, 1.0), whole)
    assert float(distillation_loss(b, b, batch)) == 0


def test_classes_of_images_are_on_their_axis() -> None:
    a, b = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    labels = torch.zeros(2, 4, 4, dtype=torch.long)
    labels[:, 0] = -100
    p, q = (z.softmax(1) for z in (b, a))
    expected = (p * (p / q).log()).sum(1)[:, 1:].mean()
    torch.testing.assert_close(distillation_loss(a, b, Batch((), {}, labels), 1.0), expected)


def test_a_shift_of_one_logit_or_of_all_labels_is_seen() -> None:
    z = torch.randn(8, 1)
    assert float(distillation_loss({"logits": z + 1}, {"logits": z}, Batch())) > 0.1
    z = torch.randn(8, 5)
    labels = (torch.rand(8, 5) > 0.5).float()
    assert float(distillation_loss({"logits": z + 1}, {"logits": z}, Batch((), {}, labels))) > 0.01
    classes = Batch((), {}, torch.arange(8) % 5)
    assert float(distillation_loss({"logits": z + 1}, {"logits": z}, classes)) < 1e-6, "a softmax has no such shift"


def test_masked_scores_are_no_difference() -> None:
    z = torch.randn(4, 6)
    masked = z.masked_fill(torch.arange(6) > 3, -torch.inf)
    for labels in (None, torch.zeros(4, dtype=torch.long)):
        batch = Batch((), {}, labels)
        assert float(distillation_loss(masked, masked, batch)) == 0
        assert 0 < float(distillation_loss(masked * 2, masked, batch)) < torch.inf
        scalar, _ = projection(masked, batch, torch.Generator())
        assert scalar.isfinite()


def test_detections_that_only_one_model_has() -> None:
    a = [{"boxes": torch.ones(2, 4)}, {"boxes": torch.ones(3, 4)}]
    b = [{"boxes": torch.ones(2, 4)}, {"boxes": torch.ones(1, 4)}]
    assert float(distillation_loss(a, b, Batch())) == pytest.approx(2 / 3)
    with pytest.raises(TrainingError, match=r"where the teacher's output \*\.boxes is"):
        distillation_loss(a[:1], b, Batch())
    nothing = [{"boxes": torch.ones(0, 4)}]
    assert float(distillation_loss(nothing, nothing, Batch())) == 0


@pytest.mark.parametrize("missing", [{"a": torch.ones(2)}, {"a": torch.ones(2), "b": torch.ones(3)}])
def test_outputs_of_other_parts_or_shapes(missing: dict[str, Tensor]) -> None:
    with pytest.raises(TrainingError, match="where the teacher's output b is"):
        distillation_loss(missing, {"a": torch.ones(2), "b": torch.ones(2)}, Batch())


class Heads(nn.Module):
    """Classes, labels and boxes from one trunk."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, 8))
        self.heads = nn.ModuleDict({name: nn.Linear(8, 3) for name in ("logits", "tags", "boxes")})

    def forward(self, x: Tensor) -> dict[str, Any]:
        h = self.trunk(x)
        return {"logits": self.heads["logits"](h), "deep": [{"tags": self.heads["tags"](h)}, (self.heads["boxes"](h),)]}


@pytest.mark.slow
def test_the_projection_is_the_second_derivative_of_the_distance() -> None:
    """Mean of g g^T over many draws against the Hessian of the distance, by a shift of the trunk's output."""
    torch.manual_seed(1)
    model = Heads().double()
    x = torch.randn(5, 6, dtype=torch.float64)
    meaning = OutputMeaning.of(model, {"logits": "classes", "deep.0": "multilabel", "deep.1": 3.0})
    batch = Batch((x,), meaning=meaning)
    h = model.trunk(x).detach()

    def output(shift: Tensor) -> dict[str, Any]:
        z = {name: head(h + shift) for name, head in model.heads.items()}
        return {"logits": z["logits"], "deep": [{"tags": z["tags"]}, (z["boxes"],)]}

    taught = output(torch.zeros(8, dtype=torch.float64))
    hessian: Any = torch.autograd.functional.hessian(
        lambda shift: distillation_loss(output(shift), taught, batch, 1.0), torch.zeros(8, dtype=torch.float64)
    )
    generator, total = torch.Generator().manual_seed(0), torch.zeros(8, 8, dtype=torch.float64)
    draws = 4000
    for _ in range(draws):
        shift = torch.zeros(8, dtype=torch.float64, requires_grad=True)
        scalar, positions = projection(output(shift), batch, generator)
        (g,) = torch.autograd.grad(scalar, shift)
        total += torch.outer(g, g) / positions / draws
    # the distance of a shift s is s^T (H / 2) s, and 4000 draws leave about 1 / sqrt(4000) of it
    error = (total - hessian / 2).norm() / (hessian / 2).norm()
    assert error < 0.1, float(error)
    assert (total - hessian).norm() / hessian.norm() > 0.3, "a factor of two would be seen"


def test_what_is_chosen_is_what_is_kept() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = (nn.Sequential(nn.Linear(6, 48), nn.ReLU(), nn.Linear(48, 4)) for _ in range(2))

        def forward(self, x: Tensor) -> dict[str, Any]:
            return {"a": self.a(x), "more": [{"b": self.b(x)}]}

    model, data = Two(), [torch.randn(64, 6) for _ in range(6)]

    def lost(**options: Any) -> list[float]:
        small = compress(model, data, flops=0.6, **options, **QUIET).model
        with torch.no_grad():
            found, own = tensors_in(small(data[0])), tensors_in(model(data[0]))
        return [float(ratio(found[name][0], own[name][0])) for name in ("a", "more.*.b")]

    a, b = lost(output={"a": 100.0, "more": 1.0})
    assert a < b / 3
    a, b = lost(output={"a": 1.0, "more": 100.0})
    assert b < a / 3
    a, b = lost()
    assert 1 / 5 < a / b < 5
    with pytest.raises(UsageError, match="measured loss of exactly 0 for a changed model, with outputs that are"):
        lost(output="a")


def test_a_loss_that_cannot_see_is_an_error() -> None:
    class One(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(6, 48), nn.ReLU(), nn.Linear(48, 1))

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"logits": self.net(x)}

    data = [torch.randn(64, 6) for _ in range(6)]
    result = compress(One(), data, flops=0.7, **QUIET)
    assert all(site.loss for site in result.plan.sites)
    with pytest.raises(LinearizeError, match=r"exactly 0 .*output=\{\"logits\": \"values\"\}"):
        compress(One(), data, flops=0.7, output={"logits": "classes"}, **QUIET)
    with pytest.raises(LinearizeError, match="exactly 0"):
        compress(One(), data, linear=0.7, output={"logits": "classes"}, **QUIET)


def test_channels_that_never_mattered_may_go_without_loss() -> None:
    net = nn.Sequential(nn.Linear(6, 48), nn.ReLU(), nn.Linear(48, 4))
    with torch.no_grad():
        net.get_parameter("0.bias")[:24] = -100.0
    data = [torch.randn(64, 6) for _ in range(6)]
    assert compress(net, data, flops=0.5, **QUIET).report.outcome is not None


def test_images_as_targets_are_learned_as_images() -> None:
    model = nn.Conv2d(3, 3, 3, padding=1)
    clean = torch.rand(64, 3, 8, 8)
    data = list(zip((clean + 0.2 * torch.randn_like(clean)).split(16), clean.split(16), strict=True))
    with torch.no_grad():
        before = ratio(model(data[0][0]), data[0][1])
    finetune(model, data, epochs=60, lr=2e-2, progress=False)
    with torch.no_grad():
        after = ratio(model(data[0][0]), data[0][1])
    assert before > 0.5
    assert after < 0.1


def test_segmentation_is_evaluated_on_its_axis() -> None:
    class Shifted(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.one_hot(x[:, 0].long(), 3).movedim(-1, 1).float() * 20

    maps = torch.randint(0, 3, (4, 5, 7))
    found = evaluate_batches(Shifted(), [(maps[:, None].float(), maps)])
    assert found["accuracy"] == 1.0
    assert found["eval_loss"] < 1e-6


def test_the_main_part() -> None:
    assert main_part((torch.ones(2, 3), torch.ones(4))).name == "0"
    assert main_part({"features": torch.ones(3), "head": {"logits": torch.ones(2)}}).name == "head.logits"


@pytest.mark.slow
def test_the_command_line_chooses_parts(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("timm")
    sizes = ["-a", "img_size=8", "-a", "patch_size=4", "-a", "depth=1", "-a", "in_chans=1"]
    command = ["compress", "timm:test_vit", *sizes, "--data", "digits", "--limit", "64", "--batch", "16"]
    command += ["--train", "0", "--json", "--search", "0", "--no-modules"]
    command += ["--flops", "0.8", "--epochs", "0", "--dry-run"]
    losses = []
    for chosen in ("output=values", "output=classes", "output=multilabel"):
        assert run([*command, "--output", chosen]) == 0
        losses.append(json.loads(capsys.readouterr().out)["budget"]["loss"])
    assert len(set(losses)) == 3, losses
    for wrong, said in (
        ("boxes", "names no part of the output. Its parts are output"),
        ("output=-1", "above 0 or kinds"),
    ):
        assert run([*command, "--output", wrong]) != 0
        assert said in capsys.readouterr().err
