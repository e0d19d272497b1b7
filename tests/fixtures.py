"""Fixtures of several files: time that does not depend on the machine, and pictures as they were drawn."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from linearize import bench
from tests import browser


class Clock:
    """A clock that only sleeping moves: what is measured is what was slept, however busy the machine is."""

    def __init__(self) -> None:
        self.now = 0.0

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The clock of `benchmark`, to be moved by the models that are timed."""
    made = Clock()
    monkeypatch.setattr(bench, "time", SimpleNamespace(perf_counter=made.perf_counter))
    return made


@pytest.fixture
def timed_by_flops(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every call takes as long as its FLOPs at one TFLOP per second, and a nanosecond for the call."""

    def measure(run: Callable[[], Any], number: int, device: torch.device) -> float:
        with FlopCounterMode(display=False) as counter:
            run()
        return 1e-9 + counter.get_total_flops() * 1e-12

    monkeypatch.setattr(bench, "_measure", measure)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures that were written, to be judged by what is in them."""
    from matplotlib.figure import Figure

    figures: list[Any] = []
    write = Figure.savefig

    def savefig(figure: Any, *args: Any, **options: Any) -> None:
        write(figure, *args, **options)
        figures.append(figure)

    monkeypatch.setattr(Figure, "savefig", savefig)
    return figures


def labels(axes: Any) -> tuple[str, str]:
    """What the axes are named."""
    return axes.get_xlabel(), axes.get_ylabel()


def values(line: Any) -> list[float]:
    """The heights of a curve's points."""
    return [float(y) for y in line.get_ydata()]


def heights(axes: Any) -> list[float]:
    """The heights of upright bars."""
    return [float(bar.get_height()) for bar in axes.patches]


def widths(axes: Any) -> list[float]:
    """The lengths of lying bars."""
    return [float(bar.get_width()) for bar in axes.patches]


@pytest.fixture(scope="module")
def window() -> Iterator[Any]:
    """A real browser, to look at pages with."""
    if browser.PROGRAM is None:
        pytest.skip("no Chromium here; html.parser has checked the page")
    with browser.browser() as opened:
        yield opened
