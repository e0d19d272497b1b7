"""What all pictures of the laboratory share: colours, a figure without a window, writing a file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from linearize.errors import UsageError

# Two hues that differ for every kind of colour vision, and one grey for what is not there any more.
FIRST, SECOND, LINEAR, INK = "#2166ac", "#e08214", "#dcdcdc", "#333333"


NAMED_ROWS = 40  # more rows than this go without names


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


def head(axes: Any, title: str, text: str) -> None:
    """Title on the left, and no frame at the top and the right."""
    axes.set_title(f"{title}: {text}" if title else text, loc="left", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
