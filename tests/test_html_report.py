"""The page of a report: it holds everything, shows strangers' texts as texts, and needs nothing but itself."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import linearize
from linearize.errors import UsageError
from linearize.plan import Plan, SitePlan
from linearize.planning.decision import Decision
from linearize.report import charts
from linearize.report.compression import Report
from linearize.report.layers import layer_rows
from linearize.report.trial import Trial
from linearize.summary import SiteSummary, Summary
from tests import browser
from tests.pages import HOSTILE, Page, check_alone, check_shown


@pytest.fixture(scope="module")
def result() -> linearize.Result:
    """A compression with everything in it: search, fine-tuning, quality, latency."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 48), nn.GELU(), nn.Linear(48, 48), nn.ReLU(), nn.Linear(48, 3))
    data = [(torch.randn(32, 8), torch.randint(0, 3, (32,))) for _ in range(6)]
    return linearize.compress(
        net, data, flops=0.5, finetune=2, evaluate=data[:2], rounds=3, batch_sizes=[1, 4], search=4, progress=False
    )


@pytest.fixture(scope="module")
def saved(result: linearize.Result, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "report.html"
    result.report.save(path)
    return path


@pytest.fixture(scope="module")
def page(saved: Path) -> Page:
    return Page(saved.read_text(encoding="utf-8"))


def test_the_page_stands_alone(page: Page) -> None:
    check_alone(page)
    with pytest.raises(AssertionError):
        check_alone(Page("<img src='http://example.com/a.png' alt='a'>"))
    with pytest.raises((AssertionError, KeyError)):
        check_alone(Page("<svg></svg>"))


def test_the_plan_is_in_it(page: Page, result: linearize.Result) -> None:
    again = Plan.from_json(page.saved("plan.json"))
    assert again == result.plan
    assert again.sha256 == result.report.plan
    assert json.loads(page.saved("report.json")) == json.loads(json.dumps(result.report.to_dict()))


def test_everything_is_shown(page: Page, result: linearize.Result) -> None:
    report = result.report
    assert report.outcome is not None
    assert report.timing is not None
    assert str(report.outcome) in page.text
    names = [attributes["aria-label"] or "" for tag, attributes in page.tags if tag == "svg"]
    layers = [name for name in names if re.match(r"\d, ", name)]
    assert [name.split(",")[0] for name in layers] == [site.site for site in result.plan.sites]
    for site in result.plan.sites:
        assert any(f"{site.site}, {site.form}: {site.channels} nonlinear channels" in name for name in layers)
    (latency,) = [name for name in names if name.startswith("Latency")]
    assert all(str(ratio) in latency for ratio in report.timing.ratios)
    assert sum(name.startswith("Search") for name in names) == 1
    assert sum(name.startswith("Training") for name in names) >= 2
    assert len(report.trials) >= 1
    assert all(trial.name in page.text for trial in report.trials)
    assert report.versions["torch"] == torch.__version__
    assert f"torch {torch.__version__}" in page.text
    for shown in (report, result.plan, report.summary):  # a notebook and the page say the same
        assert shown._repr_html_() in _body(report)


def _body(report: Report) -> str:
    from linearize.report.page import page_of

    return page_of(report, report._repr_html_())


def test_the_search_is_told_as_it_was(result: linearize.Result) -> None:
    trials = result.report.trials
    assert trials[0] == Trial("at the start", trials[0].loss, wins=True)
    best = [trial.loss for trial in trials if trial.wins and trial.loss is not None]
    assert best == sorted(best, reverse=True)
    assert len(set(best)) == len(best)


def test_a_decision_keeps_its_trials(tmp_path: Path, result: linearize.Result) -> None:
    report = result.report
    assert report.outcome is not None
    made = Decision(result.plan, (), report.outcome, {}, (), report.trials)
    made.write(tmp_path / "plan.json", "key")
    again = Decision.read(tmp_path / "plan.json", "key")
    assert again is not None
    assert again.told()["trials"] == report.trials


def test_texts_of_strangers_are_texts(result: linearize.Result, tmp_path: Path) -> None:
    plan = Plan((SitePlan(HOSTILE, "merged", (0, 1), channels=4, loss=0.5, reason=HOSTILE),))
    summary = Summary((SiteSummary(HOSTILE + "2", HOSTILE, 4, 1, gated=False, form=None, reason=HOSTILE),))
    report = replace(
        result.report, planned=plan, summary=summary, model=HOSTILE, notes=(HOSTILE,), kept={HOSTILE: HOSTILE},
        options={HOSTILE: HOSTILE}, versions={HOSTILE: HOSTILE}, seconds={HOSTILE: 1.0},
        trials=(Trial(HOSTILE, 0.5, wins=True),), quality={HOSTILE: {HOSTILE: 1.0}},
        history=[{"epoch": 1.0, HOSTILE: 2.0}],
    )  # fmt: skip
    report.save(tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    check_alone(page)
    assert "<script" not in text
    assert page.text.count(HOSTILE) >= 8
    assert Plan.from_json(page.saved("plan.json")) == plan


def test_little_is_enough(result: linearize.Result) -> None:
    report = result.report
    bare = Report({}, report.summary, report.before, report.after, None, None)
    page = Page(_body(bare))
    check_alone(page)
    assert not [a for tag, a in page.tags if tag == "a" and a.get("download") == "plan.json"]
    names = [attributes["aria-label"] or "" for tag, attributes in page.tags if tag == "svg"]
    assert len(names) == len(report.summary.sites), "without a plan, the sites are the picture"
    nothing = Report({}, Summary(()), report.before, report.after, None, None)
    assert "There is no site." in Page(_body(nothing)).text


def test_a_dry_run_has_a_page() -> None:
    net = nn.Sequential(nn.Linear(8, 48), nn.GELU(), nn.Linear(48, 3))
    data = [torch.randn(16, 8) for _ in range(4)]
    dry = linearize.compress(net, data, flops=0.5, dry_run=True, rounds=0, progress=False)
    page = Page(_body(dry.report))
    assert "predicted" in page.text
    assert Plan.from_json(page.saved("plan.json")) == dry.plan
    options = "\n".join(dry.report.options.values())
    assert options.splitlines()[0].split()[0] in page.text


def test_layers_tell_what_became_of_them() -> None:
    plan = Plan(
        (
            SitePlan("a", "merged", (0, 1, 2), channels=8, dropped=(0,), rank=4, loss=0.25),
            SitePlan("b", "narrowed", (), channels=4, dropped=(1,), loss=0.5),
            SitePlan("c.attn", "whole module", (), loss=0.125),
            SitePlan("d", "unchanged", (), channels=4, reason="no other option costs less"),
        )
    )
    inside = SiteSummary("c.attn.act", "gelu", 4, 0, gated=True, form=None, reason=None)
    gateless = SiteSummary("e", "softmax", 0, 0, gated=False, form=None, reason="no channel axis")
    rows = layer_rows(plan, Summary((inside, gateless)))
    assert [row.name for row in rows] == ["a", "b", "c.attn", "d", "e"]
    assert "8 nonlinear channels: 5 stay, 2 are linear, 1 removed, skip of rank 4, predicted loss 0.25" in rows[0].bar
    assert [row.width for row in rows] == ["8 → 5", "4 → 3", "", "4 → 4", ""]
    assert "replaced as a whole" in rows[2].bar
    assert [row.reason for row in rows[3:]] == ["no other option costs less", "no channel axis"]
    assert rows[1].loss_bar is not None
    assert 'width="360.00"' in rows[1].loss_bar, "the largest loss fills its row"
    assert rows[3].loss_bar is None


def test_charts_of_odd_numbers() -> None:
    given_up = charts.trials([Trial("at the start", 0.0, wins=True), Trial("in trial 1", None, wins=False)])
    assert "the best is the one at the start" in given_up
    none = charts.trials([Trial("in trial 1", None, wins=False)])
    assert "no plan was measured to the end" in none
    wide = charts.trials([Trial("a", 1e-8, wins=True), Trial("b", 1.0, wins=False)])
    assert "(logarithmic)" in wide
    for drawn in (given_up, none, wide, charts.curve("loss", [{"epoch": 1.0, "loss": float("nan")}])):
        assert "nan" not in drawn
        assert "inf" not in drawn.replace("none finite", "")


def test_json_and_nothing_else(result: linearize.Result, tmp_path: Path) -> None:
    result.report.save(tmp_path / "report.json")
    stored = json.loads((tmp_path / "report.json").read_text())
    assert stored["trials"][0]["name"] == "at the start"
    assert stored["versions"]["python"]
    for name in ("report.pdf", "report"):
        with pytest.raises(UsageError, match=r"\.json or \.html"):
            result.report.save(tmp_path / name)
    with pytest.raises(UsageError, match="cannot be written"):
        result.report.save(tmp_path / "missing" / "report.html")
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]


def test_a_write_that_fails_leaves_the_old_page(
    result: linearize.Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "report.html"
    path.write_text("old")

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(UsageError, match="No space left"):
        result.report.save(path)
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["report.html"]


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("dark", [False, True])
def test_in_a_real_browser(window: browser.Browser, saved: Path, tmp_path: Path, width: int, dark: bool) -> None:
    check_shown(window, saved, tmp_path, width, dark=dark)


def test_long_names_fit_on_a_phone(window: browser.Browser, result: linearize.Result, tmp_path: Path) -> None:
    name = "language_model_encoder" * 5
    plan = Plan((SitePlan(name, "merged", (0, 1), channels=4, rank=1, loss=1e-9, reason=f"it is read by {name}"),))
    report = replace(
        result.report, planned=plan, model=name, notes=(name,), options={name: name}, versions={name: name},
        kept={name: name}, trials=(Trial(name, 0.5, wins=True),), seconds={name: 1.0},
    )  # fmt: skip
    report.save(tmp_path / "report.html")
    check_shown(window, tmp_path / "report.html", tmp_path, 390, dark=False)


def test_the_browser_would_complain(window: browser.Browser, tmp_path: Path) -> None:
    bad = tmp_path / "bad.html"
    bad.write_text("<style>body { width: 2000px }</style><script>console.error('no')</script><svg role=img></svg>")
    window.open(bad, 390)
    assert window.complaints()
    assert window.value("document.documentElement.scrollWidth") > 390
    assert not all(window.pictures()) or not window.pictures()
