"""Pictures of a compression: which layers became linear, what that cost, and what it saved."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from linearize.errors import UsageError

__all__ = ["draw"]

# Two hues that differ for every kind of colour vision, and one grey for what is compared against.
_LINEAR, _NONLINEAR, _BEFORE, _INK = "#e08214", "#d4d4d4", "#8c8c8c", "#333333"


def draw(reports: Mapping[str, Mapping[str, Any]], path: str | os.PathLike[str]) -> None:
    """Draw reports of `compress`, one row per model, and write the picture.

    Left: the share of linear channels in each site, in order of execution. Right: what remains of parameters,
    FLOPs and latency, the original being 1, with quartiles of the measured latency, and the quality.

    Args:
        reports: a title and `Report.to_dict()` for each model.
        path: file to write; its ending chooses the format (.png, .svg, .pdf).

    Raises:
        UsageError: matplotlib is not installed, there is no report, or the file cannot be written.
    """
    if not reports:
        raise UsageError("reports", "found none", "Pass at least one report.")
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UsageError("draw", "matplotlib is not installed", "pip install 'linearize[plot]'") from error
    figure = Figure(figsize=(10, 2.9 * len(reports)), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(reports), 2, squeeze=False, width_ratios=[1.6, 1])
    for row, (title, report) in zip(grid, reports.items(), strict=True):
        _draw_sites(row[0], title, [site for site in report["sites"] if site["gated"]])
        _draw_gains(row[1], report)
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=2, fontsize=8, frameon=False)
    try:
        figure.savefig(Path(path), dpi=160)
    except (OSError, ValueError) as error:
        raise UsageError(str(path), f"cannot be written ({error})", "Pass a .png, .svg or .pdf file.") from error


def _draw_sites(axes: Any, title: str, sites: Sequence[Mapping[str, Any]]) -> None:
    """A bar per site: the linear share over the rest."""
    shares = [site["linear"] / site["channels"] for site in sites]
    places = range(len(sites))
    axes.bar(places, [1.0] * len(sites), color=_NONLINEAR, label="nonlinear")
    axes.bar(places, shares, color=_LINEAR, label="linear, folded away")
    for place, share in zip(places, shares, strict=True):
        text = f"{share:.0%}" if len(sites) <= 16 else ""
        axes.text(place, share / 2, text, ha="center", va="center", fontsize=8, color=_INK)
    names, rest = _short_names([site["name"] for site in sites])
    axes.set_xticks(places, names, fontsize=8, rotation=0 if len(sites) <= 10 else 90)
    axes.set_xlabel(rest, fontsize=8, color=_BEFORE)
    axes.set_ylim(0, 1)
    axes.set_yticks([0, 0.5, 1], ["0", "50%", "100%"])
    axes.set_ylabel("channels of the site")
    axes.set_title(title, loc="left", fontsize=10, fontweight="bold")
    axes.spines[["top", "right"]].set_visible(False)


def _short_names(names: Sequence[str]) -> tuple[list[str], str]:
    """The parts of dotted names that differ, and what they have in common, "*" for the parts that differ.

    Examples:
        >>> _short_names(["blocks.0.mlp.act", "blocks.1.mlp.act"])
        (['0', '1'], 'blocks.*.mlp.act')
    """
    parts = [name.split(".") for name in names]
    if len({len(part) for part in parts}) != 1:
        return list(names), ""
    differ = [len(set(column)) > 1 for column in zip(*parts, strict=True)]
    if not any(differ):
        return list(names), ""
    short = [".".join(p for p, own in zip(part, differ, strict=True) if own) for part in parts]
    return short, ".".join("*" if own else p for p, own in zip(parts[0], differ, strict=True))


def _draw_gains(axes: Any, report: Mapping[str, Any]) -> None:
    """What remains of each cost, as bars against the original."""
    before, after = report["cost"]["before"], report["cost"]["after"]
    ratios = report["timing"]["ratios"] if report.get("timing") else []
    bars: list[tuple[str, float, tuple[float, float] | None]] = [
        ("parameters", after["parameters"] / before["parameters"], None),
        ("FLOPs", after["flops"] / before["flops"], None),
    ]
    bars += [(f"latency, batch {r['batch_size']}", r["median"], (r["q1"], r["q3"])) for r in ratios]
    for place, (_, value, spread) in enumerate(reversed(bars)):
        axes.barh(place, value, color=_LINEAR, height=0.6)
        if spread is not None:
            low, high = max(0.0, value - spread[0]), max(0.0, spread[1] - value)
            axes.errorbar(value, place, xerr=[[low], [high]], color=_INK, capsize=3, linewidth=1)
        right = value if spread is None else spread[1]
        axes.text(right + 0.02, place, f"{value:.2f}", va="center", fontsize=9, color=_INK)
    axes.axvline(1, color=_BEFORE, linewidth=1, linestyle="--")
    axes.set_yticks(range(len(bars)), [name for name, _, _ in reversed(bars)], fontsize=9)
    widest = max(value if spread is None else spread[1] for _, value, spread in bars)
    axes.set_xlim(0, max(1.0, widest) + 0.18)
    axes.set_xticks([0, 0.5, 1], ["0", "0.5", "original"], fontsize=8)
    metric = report.get("metric")
    quality = (report.get("quality") or {}).get(metric, {})
    steps = [f"{quality[name]:.3f} {name}" for name in ("before", "gated", "collapsed") if name in quality]
    axes.set_title(f"{metric} " + ", ".join(steps) if steps else "", loc="right", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
