"""benchmarks/peers on next to nothing: every room runs, and what it removes is removed exactly."""

from __future__ import annotations

import copy
import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import linearize
from benchmarks.peers import channels
from benchmarks.peers.folding import layer_folding
from benchmarks.peers.gates import gates
from benchmarks.peers.hidden import channels_of, cut, hidden_of
from benchmarks.peers.measure import side_by_side
from benchmarks.peers.pictures import draw_all
from benchmarks.peers.refit import consumed, refit, removal
from benchmarks.peers.subject import Candidate, Subject
from benchmarks.peers.tables import markdown
from benchmarks.peers.training import epochs, pace, train
from benchmarks.peers.widths import by_removal, by_width, from_scratch, no_cut
from linearize.cost import cost
from tests.test_data import write_idx

pytestmark = pytest.mark.slow


class Ffn(nn.Module):
    def __init__(self, inputs: int, channels: int) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(inputs, channels), nn.ReLU(), nn.Linear(channels, inputs)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc2(self.act(self.fc1(x)))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(Ffn(8, 32), Ffn(8, 32))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(x))


def subject(steps: int = 4) -> Subject:
    torch.manual_seed(0)
    x = torch.randn(256, 8)
    labels = (x[:, 0] > 0).long() + (x[:, 1] > 0).long()
    order = epochs(len(x), 32, 0)

    def pick(step: int) -> tuple[Tensor, Tensor]:
        chosen = list(order(step))
        return x[chosen], labels[chosen]

    def score(model: nn.Module) -> dict[str, float]:
        return {"accuracy": float((model(x).argmax(1) == labels).double().mean())}

    model = Net().eval()
    known = list(zip(x.split(32), labels.split(32), strict=True))
    made = Subject(model, x[:16], known, pick, score, steps, 1e-2, hidden_of(model), ("head",), sizes=(1, 16))
    train(model, made.task_loss, 20, 1e-2)
    return made


def test_cutting_dead_channels_changes_nothing() -> None:
    model, x = Net(), torch.randn(5, 8)
    keep = torch.arange(0, 32, 2)
    for hidden in hidden_of(model):
        consumer = model.get_submodule(hidden.consumer)
        assert isinstance(consumer, nn.Linear)
        consumer.weight.data[:, 1::2] = 0
    expected = model(x)
    for hidden in hidden_of(model):
        cut(model, hidden, keep)
        assert channels_of(model, hidden) == 16
    torch.testing.assert_close(model(x), expected)


def test_an_inverted_residual_is_cut_through_its_norms() -> None:
    pytest.importorskip("timm")
    from benchmarks.peers.networks import make

    model, x = make("mobilenet", 0).eval(), torch.randn(2, 1, 28, 28)
    expected = model(x)
    found = hidden_of(model)
    assert len(found) == 7
    for hidden in found:
        cut(model, hidden, torch.arange(channels_of(model, hidden)))
    torch.testing.assert_close(model(x), expected)
    for hidden in found:
        cut(model, hidden, torch.arange(channels_of(model, hidden) // 2))
    assert cost(model, x).flops < 0.6 * cost(make("mobilenet", 0), x).flops
    assert model(x).shape == expected.shape


def test_refitting_restores_what_others_say_too() -> None:
    made = subject()
    model = copy.deepcopy(made.model)
    hidden = made.hidden[0]
    producer, consumer = (model.get_submodule(path) for path in (hidden.producers[0], hidden.consumer))
    assert isinstance(producer, nn.Linear)
    assert isinstance(consumer, nn.Linear)
    producer.weight.data[16:] = producer.weight.data[:16]
    producer.bias.data[16:] = producer.bias.data[:16]
    made.model = model
    moments = consumed(made)[0]
    small, x = copy.deepcopy(model), made.example
    refit(small, hidden, torch.arange(16), *moments)
    torch.testing.assert_close(small(x), model(x), rtol=0.02, atol=0.02)


def test_removal_takes_the_useless_first() -> None:
    weight = torch.ones(1, 4, dtype=torch.float64)
    weight[0, 2] = 0
    late = removal(weight, torch.zeros(4), torch.diag(torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)))
    assert late.argsort().tolist() == [2, 0, 1, 3]


def test_methods_side_by_side_become_a_table_and_a_picture(tmp_path: Path, drawn: list[Any]) -> None:
    def broken(_: Subject, budgets: object) -> list[Candidate]:
        return [Candidate(0.6, None, failed="no")]

    made = subject()
    methods = {
        "width + refit": by_width,
        "removal + refit": by_removal,
        "layer folding": layer_folding(),
        "scratch": from_scratch(Net, lambda model: model, 3),
        "no cut": no_cut,
        "broken": broken,
    }
    found = side_by_side(made, methods, (0.6, 0.05), rounds=1, say=False)
    json.dumps(found, allow_nan=False)
    rows = {(row["method"], row["budget"]): row for row in found["rows"]}
    assert rows["broken", 0.6]["failed"] == "no"
    for name in list(methods)[:4]:
        assert rows[name, 0.6]["met"]
        assert rows[name, 0.6]["flops"] <= 0.6
        assert not rows[name, 0.05]["met"]  # the head alone costs more
    assert set(rows["width + refit", 0.6]["latency"]) == {"1", "16"}
    assert rows["layer folding", 0.6]["steps"] == 2
    result = {"experiment": "images", "network": "net", "seed": 0, **found}
    text = markdown([result, {**result, "seed": 1}], "images", "net")
    assert "| broken | failed |" in text
    assert "2 seeds" in text
    timed = side_by_side(made, {"width + refit": by_width}, (0.6,), rounds=2, timing_only=True, say=False)
    (row,) = timed["rows"]
    assert "after" not in row
    slow = {**result, "timing_only": True, "rows": [{**row, "latency": {"1": [7.0, 6.5, 7.5], "16": [8.0, 8.0, 8.0]}}]}
    text = markdown([result, {**result, "seed": 1}, slow], "images", "net")
    assert f"| width + refit | {row['flops']:.2f} / 7.00 ± 0.50 / 8.00 ± 0.00 |" in text
    assert "2 seeds" in text
    (picture,) = draw_all([result, {**result, "seed": 1}], tmp_path).values()
    (figure,) = drawn
    assert picture.exists()
    assert len(figure.axes) == 3  # FLOPs, and the latency at two batch sizes
    (legend,) = figure.legends
    named = {text.get_text() for text in legend.get_texts()}
    assert named == set(methods)
    lines = [line for line in figure.axes[0].get_lines() if len(line.get_xdata())]
    assert any(
        float(x) == pytest.approx(rows["width + refit", 0.6]["flops"]) for line in lines for x in line.get_xdata()
    )


def test_fine_tuning_must_help_on_the_held_back_data() -> None:
    made = subject()
    made.held = made.calibration[:2]
    exact = copy.deepcopy(made.model)
    ruined = Net().eval()
    made.distill = 1.0
    methods = {"exact": lambda *_: [Candidate(1.0, exact)], "ruined": lambda *_: [Candidate(1.0, ruined)]}
    first, second = side_by_side(made, methods, (1.0,), rounds=0, say=False)["rows"]
    assert first["kept"] == "before"
    assert first["after"] == first["before"] == made.score(made.model)
    assert made.judge(exact) < 1e-6
    assert second["kept"] == "after"


def test_units_are_left_within_the_budget() -> None:
    made = subject(6)
    for method in (channels.planned, channels.selective(4)):
        for candidate in method(made, (0.5, 0.25)):
            assert candidate.met
            assert candidate.model is not None
            assert channels.share_left(candidate.model) == candidate.reached
            assert not any(gate.alpha.requires_grad for gate in linearize.gates(candidate.model).values())
    for equal in (True, False):
        half, few = channels.spread(made, (0.5, 0.1), equal=equal)
        assert half.reached == 0.5
        assert 0.08 < few.reached <= 0.1
        left = [int((~gate.linear).sum()) for gate in linearize.gates(half.model or Net()).values()]
        assert not equal or left == [16, 16]


def test_snl_stops_when_the_budget_holds() -> None:
    (found,) = channels.selective(400, weight=5.0)(subject(400), (0.9,))
    assert found.told == {"forced": False, "threshold": 0.99}
    assert 0 < (found.steps or 0) < 400


def test_the_pace_and_the_batches() -> None:
    assert pace(0, 100) < pace(5, 100) > pace(50, 100) > pace(99, 100)
    order = epochs(10, 3, 0)
    seen = [place for step in range(3) for place in order(step)]
    assert len(set(seen)) == 9
    assert list(order(1)) == list(epochs(10, 3, 0)(1))
    assert list(order(1)) != list(epochs(10, 3, 1)(1))


@pytest.mark.filterwarnings("ignore")
def test_torch_pruning_meets_budgets_or_says_why() -> None:
    pytest.importorskip("torch_pruning")
    from benchmarks.peers.pruning import torch_pruning

    made = subject()
    before = copy.deepcopy(made.model.state_dict())
    for rule in ("magnitude", "taylor"):
        first, second = torch_pruning("hidden", rule)(made, (0.6, 0.05))
        assert first.met
        assert first.model is not None
        assert made.share(first.model) == first.reached <= 0.6
        assert not second.met
        assert second.model is not None
    made.last = ("nowhere",)
    (failed,) = torch_pruning("all", "magnitude")(made, (0.6,))
    assert failed.model is None
    assert "KeyError" in failed.failed
    for name, value in made.model.state_dict().items():
        assert torch.equal(value, before[name])


@pytest.mark.filterwarnings("ignore")
def test_modelopt_meets_budgets_or_says_why() -> None:
    from benchmarks.peers.nas import modelopt

    first, second = modelopt(subject(), (0.7, 0.01))
    if importlib.util.find_spec("modelopt") is None:
        assert first.failed == second.failed == "ModuleNotFoundError: No module named 'modelopt'"
    else:
        assert first.met, first.failed
        assert first.reached is not None
        assert first.reached <= 0.7 * 1.005
    assert second.model is None
    assert second.failed


@pytest.mark.filterwarnings("ignore")
def test_a_small_vit_by_plan_and_by_width(tmp_path: Path) -> None:
    pytest.importorskip("timm")
    from benchmarks.peers import images

    # In the format of Fashion-MNIST, and as many as the run asks for: the set itself need not be installed.
    size = replace(images.QUICK, steps=2, tune=1, train=500, held=100, calibrate=1, rounds=0)
    size = replace(size, methods=("plan", "width + refit"))
    for prefix, count in (("train", size.train + size.held), ("t10k", size.test)):
        pictures = torch.randint(0, 256, (count, 28, 28), dtype=torch.uint8)
        write_idx(tmp_path / f"{prefix}-images-idx3-ubyte.gz", pictures)
        write_idx(tmp_path / f"{prefix}-labels-idx1-ubyte.gz", torch.arange(count, dtype=torch.uint8) % 10)
    (job,) = images.jobs(size, 1, tmp_path, tmp_path / "out")
    found = job.work()
    assert [row["method"] for row in found["rows"]] == ["plan", "width + refit"]
    assert all(row["met"] and row["flops"] <= 0.7 for row in found["rows"])


def test_the_page_holds_the_tables_of_the_published_runs() -> None:
    from benchmarks.peers.page import PAGE, fill

    text = PAGE.read_text(encoding="utf-8")
    published = json.loads(Path("benchmarks/results/peers.json").read_text(encoding="utf-8"))
    assert fill(text, published["runs"]) == text
    assert "<!-- units, resnet -->" in text


def test_gates_decide_within_the_same_steps() -> None:
    some = subject(steps=10)
    before = copy.deepcopy(some.model.state_dict())
    made = side_by_side(some, {"gates": gates(both=False), "both": gates(both=True)}, [0.7, 0.4], rounds=0)
    assert len(made["rows"]) == 4
    for row in made["rows"]:
        assert row["met"]
        assert row["reached"] == pytest.approx(row["flops"])
        assert row["flops"] <= row["budget"]
        assert row["steps"] == 3  # seven of ten decide
    assert all(torch.equal(value, before[name]) for name, value in some.model.state_dict().items())
