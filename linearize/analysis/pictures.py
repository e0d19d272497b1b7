"""Pictures of the core network: layers by channels, and the curve of depth and width."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from linearize.errors import UsageError

if TYPE_CHECKING:
    from linearize.analysis.core import Core, CoreLayer

__all__ = ["draw_core", "draw_curve", "new_figure", "write_picture"]

# Two hues that differ for every kind of colour vision, and one grey for what is not there any more.
FIRST, SECOND, _LINEAR, INK = "#2166ac", "#e08214", "#dcdcdc", "#333333"
_BINS = 256  # more channels than a picture has room for share a bin, coloured by their nonlinear share
_NAMES = 40


def draw_core(core: Core, path: str | os.PathLike[str], title: str = "") -> None:
    """Draw what is nonlinear: a row for each site, from the input at the top, a cell for each channel.

    Raises:
        UsageError: matplotlib is not installed, or the file cannot be written.
    """
    figure, (axes,) = new_figure((8, 1.4 + 0.26 * min(len(core.layers), _NAMES)), 1)
    from matplotlib.colors import LinearSegmentedColormap

    colors = LinearSegmentedColormap.from_list("core", [_LINEAR, FIRST])
    widest = max((layer.channels for layer in core.layers), default=1)
    for place, layer in enumerate(core.layers):
        edges, values = _row(layer, widest)
        axes.pcolormesh(edges, [place - 0.42, place + 0.42], [values], cmap=colors, vmin=0, vmax=1)
        if len(core.layers) <= _NAMES:
            text = f" {layer.width} of {layer.channels}"
            axes.text(layer.channels, place, text, va="center", fontsize=7, color=INK)
    if len(core.layers) <= _NAMES:
        axes.set_yticks(range(len(core.layers)), [layer.name for layer in core.layers], fontsize=7)
    else:
        axes.set_ylabel("sites, in order of execution")
    axes.set_ylim(len(core.layers) - 0.4, -0.6)
    axes.set_xlim(0, widest * 1.16)
    axes.set_xlabel("channels; nonlinear ones are blue")
    text = f"effective depth {core.depth:.2f}, {core.share:.0%} of the channels nonlinear"
    axes.set_title(f"{title}: {text}" if title else text, loc="left", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    write_picture(figure, path)


def _row(layer: CoreLayer, widest: int) -> tuple[list[float], list[float]]:
    """Edges of the cells of a layer, and their nonlinear share."""
    bins = max(1, min(layer.channels, round(_BINS * layer.channels / widest) if widest > _BINS else layer.channels))
    edges = torch.linspace(0, layer.channels, bins + 1).round().long().tolist()
    shares = [float(layer.nonlinear[a:b].double().mean()) for a, b in pairwise(edges)]
    return [float(edge) for edge in edges], shares


def draw_curve(curve: Sequence[Mapping[str, Any]], path: str | os.PathLike[str], title: str = "") -> None:
    """Draw effective depth and effective width over the steps of a `CoreRecorder`.

    Raises:
        UsageError: nothing was recorded, matplotlib is not installed, or the file cannot be written.
    """
    if not curve:
        raise UsageError("curve", "found no row", "Call record() at least once.")
    figure, (left, right) = new_figure((9, 3), 2)
    steps = [row["step"] for row in curve]
    for axes, key, label in ((left, "depth", "effective depth, units"), (right, "width", "effective width, channels")):
        axes.plot(steps, [row[key] for row in curve], color=FIRST, marker=".", markersize=3)
        axes.set_xlabel("step")
        axes.set_ylabel(label, color=FIRST)
        axes.set_ylim(bottom=0)
        axes.spines["top"].set_visible(False)
        share = axes.twinx()
        share.plot(steps, [100 * row["share"] for row in curve], color=SECOND, linestyle="--", linewidth=1)
        share.set_ylim(0, 105)
        share.set_ylabel("nonlinear channels, %" if axes is right else "", color=SECOND)
        share.spines["top"].set_visible(False)
    if title:
        figure.suptitle(title, fontsize=10)
    write_picture(figure, path)


def new_figure(size: tuple[float, float], columns: int) -> tuple[Any, Any]:
    """A figure and its row of axes, without a window.

    Raises:
        UsageError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UsageError("draw", "matplotlib is not installed", "pip install 'linearize[plot]'") from error
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(1, columns, squeeze=False)[0]


def write_picture(figure: Any, path: str | os.PathLike[str]) -> None:
    """Write a figure; the ending of the path chooses the format.

    Raises:
        UsageError: the file cannot be written.
    """
    try:
        figure.savefig(Path(path), dpi=160)
    except (OSError, ValueError) as error:
        raise UsageError(str(path), f"cannot be written ({error})", "Pass a .png, .svg or .pdf file.") from error
