"""Pictures of what the programs of this folder measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["draw_probabilities"]

# Hues that differ for every kind of colour vision.
COLORS = ("#2166ac", "#e08214", "#1b7837", "#762a83")
MARKS = ("o", "s", "^", "D")
INK = "#333333"


def new_figure(size: tuple[float, float], rows: int = 1, columns: int = 1, **options: Any) -> tuple[Any, Any]:
    """A figure and its axes (rows, columns)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(rows, columns, squeeze=False, **options)
    for axes in grid.flat:
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
    return figure, grid


def draw_probabilities(lines: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Probability of no hidden symmetry along depth, width and input dimension, with 95% intervals."""
    titles = {"depth": "depth, hidden layers", "width": "width, units of a hidden layer", "inputs": "input dimension"}
    figure, ((*panels,),) = new_figure((10, 3.4), 1, 3, sharey=True)
    for axes, (axis, label) in zip(panels, titles.items(), strict=True):
        shown = [line for line in lines if line["axis"] == axis]
        for line, color, mark in zip(shown, COLORS, MARKS, strict=False):
            places = [row[axis] for row in line["rows"]]
            middle = [row["probability"] for row in line["rows"]]
            below = [row["probability"] - row["low"] for row in line["rows"]]
            above = [row["high"] - row["probability"] for row in line["rows"]]
            # Rounding may put an end of the interval on the wrong side by 1e-17.
            spread = [[max(0.0, value) for value in side] for side in (below, above)]
            axes.errorbar(places, middle, yerr=spread, color=color, marker=mark, markersize=4, capsize=2, linewidth=1.2)
            axes.plot([], [], color=color, marker=mark, markersize=4, label=line["title"])
        axes.set_xticks(sorted({row[axis] for line in shown for row in line["rows"]}))
        axes.set_xlabel(label, fontsize=9)
        axes.set_ylim(-0.03, 1.03)
        axes.legend(fontsize=8, frameon=False)
    panels[0].set_ylabel("P(no hidden symmetry)", fontsize=9)
    figure.savefig(path, dpi=160)
