"""The programs of benchmarks/papers on next to nothing: they run, go on where they stopped, and judge as they say."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import linearize
from benchmarks.papers import hidden_symmetries, points
from benchmarks.papers.advantage_pictures import draw_all
from benchmarks.papers.catalogues import parallel_text
from benchmarks.papers.cores import at_most_lost, decay, kernels
from benchmarks.papers.findings import findings
from benchmarks.papers.images import ImageSet, image_task
from benchmarks.papers.moments import CROSSED, moments
from benchmarks.papers.networks import ResNet, vision_transformer
from benchmarks.papers.pictures import draw_probabilities
from benchmarks.papers.statistics import mean_interval, trend, wilson
from benchmarks.papers.training import Task, Trainer, impose, pace
from benchmarks.runs import Job, Plain, finished, run_all
from tests.fixtures import values

pytestmark = pytest.mark.slow

ENDS = ("at the start", "trained")


def stripes(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Images with a bright upper or lower half."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 2, (count,), generator=generator)
    images = 0.3 * torch.randn(count, 1, 14, 14, generator=generator)
    images[labels == 1, :, :7] += 1
    images[labels == 0, :, 7:] += 1
    return images, labels


def task(seed: int = 0, *, depth: int = 8, post_sum: bool = True) -> Task:
    images = ImageSet(*stripes(64, 0), *stripes(32, 1))
    return image_task(lambda: ResNet(depth, 4, 2, post_sum=post_sum), images, seed, lr=1e-2, batch=16)


def result(experiment: str, seed: int, given: Plain) -> Plain:
    asked = {"experiment": experiment, "name": "resnet-8", "depth": 8, "classes": 10, "seed": seed}
    return {**asked, **given, "seconds": 1.0}


def test_moments_cores_and_kernel_become_findings_and_pictures(tmp_path: Path, drawn: list[Any]) -> None:
    results = [
        result("moments", 0, moments(task(), 8, (0.5, 0.8), ENDS, control=True)),
        result("cores", 0, decay(task(), 8, 6, every=2)),
        result("kernel", 0, kernels(task(), 8, (0, 0.5), 3)),
    ]
    rows = results[0]["rows"]
    assert {row["moment"] for row in rows} == {*ENDS, *CROSSED}
    assert len(rows) == 8
    assert all(0 <= row["accuracy"] <= 1 for row in rows)
    assert results[1]["curve"][0]["share"] == 1
    assert results[2]["curve"][0]["distance"] == 0
    found = findings(json.loads(json.dumps(results)))
    assert len(found) == 5
    assert all(finding["verdict"] in ("confirmed", "refuted", "undecided", "mixed") for finding in found)
    pictures = draw_all(results, tmp_path)
    assert len(pictures) == 4
    moments_, decayed, cores, kernel = drawn
    scores = {100 * row["accuracy"] for row in results[0]["rows"]}
    shown = {round(y, 9) for axes in moments_.axes for line in axes.get_lines() for y in values(line)}
    assert {round(score, 9) for score in scores} <= shown
    curve = results[1]["curve"]
    assert any(values(line) == [100 * row["accuracy"] for row in curve] for line in decayed.axes[0].get_lines())
    assert any(values(line) == [row["distance"] for row in results[2]["curve"]] for line in kernel.axes[0].get_lines())
    assert all(axes.get_lines() for axes in cores.axes if axes.get_visible())


@pytest.mark.parametrize("post_sum", [True, False])
def test_a_branch_goes_on_from_where_the_trunk_was(post_sum: bool) -> None:
    straight, branched = task(post_sum=post_sum), task(post_sum=post_sum)
    trainer = Trainer(straight, 6)
    trainer.until(6)
    other = Trainer(branched, 6)
    other.until(3)
    held = other.snapshot()
    impose(branched, 0.5)
    other.until(6)
    other.restore(held)
    other.until(6)
    for a, b in zip(straight.model.state_dict().values(), branched.model.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_imposing_makes_exactly_the_share_linear() -> None:
    made = task()
    masks = impose(made, 0.75)
    gates = linearize.gates(made.model)
    total = sum(gate.channels for gate in gates.values())
    assert sum(int(mask.sum()) for mask in masks.values()) == round(0.75 * total)
    assert all(torch.equal(gate.linear, masks[name]) for name, gate in gates.items())


def test_a_prior_leads_exactly_the_share() -> None:
    made = task()
    found = moments(made, 20, (0.8,), ENDS, control=False, led=True)
    gates = linearize.gates(made.model).values()
    assert [row["moment"] for row in found["rows"]] == list(ENDS)
    assert sum(int(gate.linear.sum()) for gate in gates) == round(0.8 * sum(gate.channels for gate in gates))
    assert not any(gate.alpha.requires_grad for gate in gates)


def test_sites_go_where_activations_behind_sums_go() -> None:
    assert len(linearize.gates(task().model)) == 7
    assert len(linearize.gates(task(post_sum=False).model)) == 4


def test_the_vision_transformer_is_gated() -> None:
    model = linearize.convert(vision_transformer(14, 3), torch.zeros(1, 1, 14, 14))
    assert [gate.channels for gate in linearize.gates(model).values()] == [128] * 3


def test_the_pace_is_one_of_two_cosines() -> None:
    rates = [pace(step, 100) for step in range(100)]
    assert max(rates) <= 1
    assert rates[75] > 0.4
    assert max(rates[74], rates[99]) < 0.01


def test_a_core_is_the_last_before_too_much_is_lost() -> None:
    values = (0.9, 0.9, 0.84, 0.9, 0.9, 0.7, 0.7, 0.9)
    curve = [{"accuracy": value, "depth": place} for place, value in enumerate(values)]
    assert at_most_lost(curve, "accuracy", 0.05)["depth"] == 2  # a single low row does not end it, two do
    assert at_most_lost(curve, "accuracy", 0.5)["depth"] == 7


def test_runs_go_on_where_they_stopped(tmp_path: Path) -> None:
    calls: list[int] = []

    def job(number: int, asked: int) -> Job:
        def work() -> Plain:
            calls.append(number)
            return {"answer": number}

        return Job(f"run-{number}", {"asked": asked}, work)

    first = run_all([job(0, 1), job(1, 1)], tmp_path, "test")
    again = run_all([job(0, 1), job(1, 2), job(2, 1)], tmp_path, "test")
    assert finished([job(0, 1), job(1, 1), job(2, 1)], tmp_path) == [again[0], again[2]]
    assert calls == [0, 1, 1, 2]  # what was asked anew is computed anew
    assert first[0] == again[0]
    assert json.loads((tmp_path / "run-1.json").read_text())["asked"] == 2
    (tmp_path / "run-0.json").write_text("{", encoding="utf-8")
    assert run_all([job(0, 1)], tmp_path, "test")[0]["answer"] == 0


def test_hidden_symmetries_of_tiny_networks(tmp_path: Path, drawn: list[Any]) -> None:
    lines = [
        hidden_symmetries.Line("depth", tuple(hidden_symmetries.Shape(3, 2, depth) for depth in (1, 2))),
        hidden_symmetries.Line("width", tuple(hidden_symmetries.Shape(3, width, 1) for width in (1, 2))),
        hidden_symmetries.Line("inputs", tuple(hidden_symmetries.Shape(n, 2, 1) for n in (1, 2))),
    ]
    judged = []
    for line in lines:
        rows = [hidden_symmetries.row(shape, hidden_symmetries.measure(shape, 3, 512)) for shape in line.shapes]
        assert all(0 <= row["low"] <= row["probability"] <= row["high"] <= 1 for row in rows)
        judged.append(hidden_symmetries.judge(line, rows))
    assert judged[0]["rows"][0]["probability"] == 1  # a single hidden layer, generic weights
    draw_probabilities(judged, tmp_path / "a.png")
    (figure,) = drawn
    for axes, shown in zip(figure.axes, judged, strict=True):
        assert values(axes.get_lines()[0]) == [row["probability"] for row in shown["rows"]]
    assert [axes.get_xlabel().split(",")[0] for axes in figure.axes] == ["depth", "width", "input dimension"]
    assert "no hidden symmetry" in hidden_symmetries.table(judged)


def test_points_see_more_than_random_ones() -> None:
    generator = torch.Generator().manual_seed(3)
    model = hidden_symmetries.Shape(4, 6, 2).network()
    hidden_symmetries.draw_weights(model, generator)
    chosen = points.choose(model, 4096, generator)
    random = points.cloud(len(chosen.points), 4, generator)
    ranks = [int(linearize.functional_dimension(model, x)) for x in (chosen.points, random)]
    assert ranks[0] >= ranks[1]


def test_statistics() -> None:
    assert wilson(0, 10)[0] == 0
    assert wilson(10, 10)[1] == 1
    assert mean_interval([2.0]) == (2.0, 0.0)
    assert trend([1, 2, 3], [9, 5, 1], [10, 10, 10]) == -trend([1, 2, 3], [1, 5, 9], [10, 10, 10])


def catalogue(folder: Path) -> Path:
    po = pytest.importorskip("polib")
    made = po.POFile()
    made.metadata = {"Content-Type": "text/plain; charset=utf-8"}
    for number in range(40):
        made.append(po.POEntry(msgid=f"Delete page {number}.", msgstr=f"Seite {number} löschen."))
    made.append(po.POEntry(msgid="Delete Page 7", msgstr="doppelt"))
    made.append(po.POEntry(msgid="not translated"))
    made.append(po.POEntry(msgid="one page", msgid_plural="many pages", msgstr_plural={0: "1 Seite", 1: "Seiten"}))
    path = folder / "x" / "locale" / "de" / "LC_MESSAGES" / "django.po"
    path.parent.mkdir(parents=True)
    made.save(str(path))
    return folder


def test_catalogues_give_each_message_once(tmp_path: Path) -> None:
    pairs = parallel_text("de", catalogue(tmp_path))
    assert len(pairs) == 42
    assert ("many pages", "Seiten") in pairs
    assert ("Delete Page 7", "doppelt") not in pairs


def test_translation_learns_and_is_scored(tmp_path: Path) -> None:
    for name in ("sacrebleu", "tokenizers", "transformers"):
        pytest.importorskip(name)
    from benchmarks.papers.translation import corpus, quality, translation_task

    text = corpus(parallel_text("de", catalogue(tmp_path)), vocabulary=120, test=4)
    made = translation_task(text, 0, lr=5e-3, width=16, batch=8)
    losses: Callable[[], Any] = lambda: float(made.loss(made.model, made.batch(0)).detach())  # noqa: E731
    before = losses()
    trainer = Trainer(made, 12)
    trainer.until(6)
    impose(made, 0.5)
    trainer.until(12)
    assert losses() < before
    assert set(made.score(made.model)) == {"chrF", "BLEU"}
    assert quality(["die Seite ist hier"], ["die Seite ist hier"])["BLEU"] == pytest.approx(1)
