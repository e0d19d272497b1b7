"""Charts of the other results: path lengths, spectra, tangent kernels, symmetries, separability."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from linearize.analysis.pictures import FIRST, INK, SECOND, new_figure, write_picture
from linearize.errors import UsageError

if TYPE_CHECKING:
    from linearize.analysis.dimension import FunctionalDimension
    from linearize.analysis.paths import PathLength
    from linearize.analysis.separability import Separability
    from linearize.analysis.symmetries import Symmetry

__all__ = ["draw_dimension", "draw_kernel", "draw_lengths", "draw_separability", "draw_symmetries"]

_NAMES = 40  # more rows than this go without names
_COLORS = {"inactive": FIRST, "active": SECOND, "parallel": "#1b7837", "unseen": "#762a83"}


def _head(axes: Any, title: str, text: str) -> None:
    axes.set_title(f"{title}: {text}" if title else text, loc="left", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)


def draw_lengths(found: PathLength, path: str | os.PathLike[str], title: str = "") -> None:
    """Draw the share of paths of each length, and their mean.

    Raises:
        UsageError: matplotlib is not installed, or the file cannot be written.
    """
    figure, (axes,) = new_figure((6, 3), 1)
    axes.bar(range(len(found.distribution)), (100 * found.distribution).tolist(), color=FIRST)
    axes.axvline(found.mean, color=SECOND, linestyle="--", linewidth=1.2)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("nonlinear units on a path")
    axes.set_ylabel(f"paths, % ({found.weighting})")
    _head(axes, title, f"average path length {found.mean:.2f}")
    write_picture(figure, path)


def draw_dimension(found: FunctionalDimension, path: str | os.PathLike[str], title: str = "") -> None:
    """Draw the rank over the samples, and the singular values with the cut between what counts and what does not.

    Raises:
        UsageError: matplotlib is not installed, or the file cannot be written.
    """
    figure, (left, right) = new_figure((9, 3), 2)
    left.plot(*zip(*found.batches, strict=True), color=FIRST, marker="o", markersize=4)
    left.axhline(found.bound, color=SECOND, linestyle="--", linewidth=1.2)
    left.text(found.batches[0][0], found.bound, "bound", color=SECOND, fontsize=8, va="bottom")
    left.set_xscale("log")
    left.minorticks_off()
    shown = [samples for samples, _ in found.batches][:: -(-len(found.batches) // 7)]
    left.set_xticks(shown, [str(samples) for samples in shown])
    left.set_ylim(0, 1.12 * max(1, found.bound))
    left.set_xlabel("samples")
    left.set_ylabel("rank")
    _head(left, title, f"functional dimension {found.rank} of {found.parameters}")
    values = found.spectrum.clamp_min(float(found.spectrum.max()) * 1e-20) if found.spectrum.numel() else found.spectrum
    right.plot(range(1, len(values) + 1), values.tolist(), color=FIRST, marker=".", markersize=3, linewidth=0)
    if found.tolerance > 0:
        right.axhline(found.tolerance, color=SECOND, linestyle="--", linewidth=1.2)
        right.set_yscale("log")
    right.set_xlabel("index")
    right.set_ylabel("singular value")
    _head(right, "", f"cut at {found.tolerance:.0e} ({found.method})")
    write_picture(figure, path)


def draw_kernel(curve: Sequence[Mapping[str, Any]], path: str | os.PathLike[str], title: str = "") -> None:
    """Draw distance and ranks of a tangent kernel over the steps of a `TangentRecorder`.

    Raises:
        UsageError: nothing was recorded, matplotlib is not installed, or the file cannot be written.
    """
    if not curve:
        raise UsageError("curve", "found no row", "Call record() at least once.")
    figure, (left, right) = new_figure((9, 3), 2)
    steps = [row["step"] for row in curve]
    left.plot(steps, [row["distance"] for row in curve], color=FIRST, marker="o", markersize=4)
    left.set_ylim(bottom=0)
    left.set_ylabel("distance from the start")
    right.plot(steps, [row["rank"] for row in curve], color=FIRST, marker="o", markersize=4, label="rank")
    effective = [row["effective_rank"] for row in curve]
    right.plot(steps, effective, color=SECOND, marker="s", markersize=4, linestyle="--", label="effective rank")
    right.set_ylim(bottom=0)
    right.legend(fontsize=8, frameon=False)
    for axes in (left, right):
        axes.set_xlabel("step")
    _head(left, title, f"tangent kernel, distance {curve[-1]['distance']:.2f} at the end")
    _head(right, "", "")
    write_picture(figure, path)


def draw_symmetries(symmetries: Iterable[Symmetry], path: str | os.PathLike[str], title: str = "") -> None:
    """Draw how many channels of each site are redundant, and why; evidence from data alone is hatched.

    Raises:
        UsageError: matplotlib is not installed, or the file cannot be written.
    """
    records = list(symmetries)
    sites = list(dict.fromkeys(record.site for record in records))
    figure, (axes,) = new_figure((7, 1.6 + 0.28 * min(len(sites), _NAMES)), 1)
    for place, site in enumerate(sites):
        start = 0
        for record in (record for record in records if record.site == site):
            count = len(record.channels) - (record.kind == "parallel")  # the first one stays
            hatch = "//" if record.evidence == "data" else None
            axes.barh(place, count, left=start, color=_COLORS[record.kind], hatch=hatch, edgecolor="white", height=0.7)
            start += count
        axes.text(start, place, f" {start}", va="center", fontsize=8, color=INK)
    for kind in dict.fromkeys(record.kind for record in records):
        axes.barh(0, 0, color=_COLORS[kind], label=kind)
    if any(record.evidence == "data" for record in records):
        axes.barh(0, 0, color="#bbbbbb", hatch="//", edgecolor="white", label="on the data only")
    if len(sites) <= _NAMES:
        axes.set_yticks(range(len(sites)), sites, fontsize=8)
    axes.set_ylim(len(sites) - 0.4, -0.6)
    axes.set_xlim(left=0)
    axes.margins(x=0.1)
    axes.set_xlabel("redundant channels")
    if records:
        figure.legend(loc="outside lower center", ncols=5, fontsize=8, frameon=False)
    total = sum(len(record.channels) - (record.kind == "parallel") for record in records)
    _head(axes, title, f"{total} redundant channels")
    write_picture(figure, path)


def draw_separability(found: Separability, path: str | os.PathLike[str], title: str = "") -> None:
    """Draw the accuracy of linear classifiers and the share of separable classes, layer by layer.

    Raises:
        UsageError: matplotlib is not installed, or the file cannot be written.
    """
    layers = found.layers
    figure, (axes,) = new_figure((max(5, 2 + 0.32 * min(len(layers), _NAMES)), 3.4), 1)
    places = range(len(layers))
    accuracy = [100 * layer.accuracy for layer in layers]
    axes.plot(places, accuracy, color=FIRST, marker="o", markersize=4, label="accuracy of linear classifiers")
    separable = [100 * layer.separable / layer.classes for layer in layers]
    axes.plot(places, separable, color=SECOND, marker="s", markersize=4, linestyle="--", label="separable classes")
    if len(layers) <= _NAMES:
        axes.set_xticks(places, [layer.name for layer in layers], fontsize=7, rotation=90)
    axes.set_ylim(-3, 103)
    axes.set_ylabel("%")
    axes.legend(fontsize=8, frameon=False)
    _head(axes, title, f"{layers[-1].separable} of {layers[-1].classes} classes separable at the output")
    write_picture(figure, path)
