"""What notebooks show: tables of results, and a bar while something goes on."""

from __future__ import annotations

import sys
from html.parser import HTMLParser
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import linearize
from linearize.cost import Cost
from linearize.plan import Plan, SitePlan
from linearize.report.compression import Report
from linearize.running.progress import progress_bar
from linearize.surgery.form_choice import make_plan

VOID = {"br", "img", "meta"}


class Cells(HTMLParser):
    """The cells of a table; every tag must be closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.cells: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        assert tag != "script"
        self.open += [tag] if tag not in VOID else []
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("td", "th"):
            self.cells[-1] += data


def test_tables_say_what_the_text_says() -> None:
    gated = linearize.convert(nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 4)), torch.randn(2, 4))
    linearize.gates(gated)["1"].linearize_(torch.arange(32) < 20)
    summary, cost = linearize.summary(gated), Cost(parameters=100, flops=200)
    quality = {"accuracy": {"before": 0.9, "collapsed": 0.8}}
    report = Report(quality, summary, cost, cost, None, None, notes=("a < b",), kept={"2": "why"})
    odd = Plan((SitePlan("<script>", "merged", (0,), channels=3),))
    for shown in (summary, make_plan(gated), report, odd):
        cells = [cell for cell in Cells(shown._repr_html_()).cells if cell]
        text = str(shown)
        assert len(cells) > 3
        # The report has a title for its one column, which the text leaves out.
        assert all(cell in text for cell in cells if cell != "value"), (cells, text)
    assert "<p>note: a &lt; b</p>" in report._repr_html_()
    assert "<script>" in Cells(odd._repr_html_()).cells


class Shown:
    """What a notebook would have on its screen, in order."""

    def __init__(self) -> None:
        self.pictures: list[str] = []

    def update(self, html: str) -> None:
        self.pictures.append(html)


@pytest.fixture
def notebook(monkeypatch: pytest.MonkeyPatch) -> Shown:
    """A process that looks like the kernel of a notebook."""
    shown = Shown()

    def display(html: str, *, display_id: bool) -> Shown:
        assert display_id
        shown.update(html)
        return shown

    top, inner = ModuleType("IPython"), ModuleType("IPython.display")
    top.get_ipython = lambda: SimpleNamespace(kernel=object())  # type: ignore[attr-defined]
    inner.HTML, inner.display = str, display  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "IPython", top)
    monkeypatch.setitem(sys.modules, "IPython.display", inner)
    return shown


def test_a_bar_in_a_cell(notebook: Shown, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("linearize.running.progress._PACE", 0.0)
    with progress_bar("batches", total=3) as advance:
        for note in ("one", "<two>", "three"):
            advance(note)
    assert len(notebook.pictures) == 5
    assert '<progress value="2" max="3">' in notebook.pictures[2]
    assert "&lt;two&gt;" in notebook.pictures[2]
    assert notebook.pictures[-1] == "", "gone when it is over"
    with progress_bar("silent", total=3, enabled=False) as advance:
        advance("one")
    assert len(notebook.pictures) == 5


def test_a_bar_goes_when_something_fails(notebook: Shown) -> None:
    with pytest.raises(KeyError), progress_bar("batches", total=None):
        raise KeyError
    assert notebook.pictures[-1] == ""
    assert "max=" not in notebook.pictures[0]


def test_finetune_shows_it(notebook: Shown) -> None:
    batches = [(torch.randn(4, 3), torch.tensor([0, 1, 0, 1]))] * 3
    linearize.finetune(nn.Linear(3, 2), batches)
    assert any("fine-tune" in picture and "3 of 3" in picture for picture in notebook.pictures)


def test_a_terminal_with_ipython_is_no_notebook(notebook: Shown, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["IPython"], "get_ipython", SimpleNamespace, raising=False)
    with progress_bar("batches", total=1) as advance:
        advance("one")
    assert not notebook.pictures


@pytest.mark.slow
def test_a_real_kernel(tmp_path: Any) -> None:
    """The real IPython, in a kernel: the bar arrives as HTML, is updated, and is empty at the end."""
    manager = pytest.importorskip("jupyter_client.manager", reason="no kernel here")
    pytest.importorskip("ipykernel", reason="no kernel here")
    kernel, client = manager.start_new_kernel(kernel_name="python3")
    try:
        code = (
            "from linearize.running.progress import progress_bar\n"
            "with progress_bar('counting', total=2) as advance:\n    advance('one')\n    advance('two')\n"
        )
        client.execute(code)
        pictures = []
        while True:
            message = client.get_iopub_msg(timeout=120)
            if message["msg_type"] in ("display_data", "update_display_data"):
                pictures.append(message["content"]["data"]["text/html"])
            assert message["msg_type"] != "error", message["content"]
            if message["msg_type"] == "status" and message["content"]["execution_state"] == "idle" and pictures:
                break
    finally:
        client.stop_channels()
        kernel.shutdown_kernel(now=True)
    assert "counting" in pictures[0]
    assert "2 of 2" in pictures[-2]
    assert pictures[-1] == ""
