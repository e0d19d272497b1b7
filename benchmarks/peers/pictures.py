"""Curves of what each method keeps, over FLOPs, measured latency or nonlinear units."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.papers.pictures import INK, new_figure
from benchmarks.peers.tables import SCORES, Point, lines_of, metric_of, names_of
from benchmarks.runs import Plain

__all__ = ["draw_all"]

# Color, mark, line: this project's methods solid, Torch-Pruning dashed and dotted, everything else thin.
_STYLES = {
    "plan": ("#2166ac", "o", "-"),
    "plan, latency": ("#67a9cf", "D", "-"),
    "removal + refit": ("#01665e", "v", "-."),
    "width + refit": ("#1b7837", "^", "-."),
    "magnitude + refit": ("#1b7837", "^", "-."),
    "Torch-Pruning, magnitude": ("#e08214", "s", "--"),
    "Torch-Pruning, Taylor": ("#b2182b", "s", "--"),
    "Torch-Pruning hidden, magnitude": ("#fdb863", "P", ":"),
    "Torch-Pruning hidden, Taylor": ("#d6604d", "P", ":"),
    "ModelOpt FastNAS": ("#4d9221", "*", "--"),
    "layer folding": ("#762a83", "X", "-."),
    "whole FFNs, one by one": ("#762a83", "X", "-."),
    "SNL": ("#b2182b", "s", "--"),
    "uniform": ("#1b7837", "^", "-."),
    "random": ("#999999", "v", ":"),
    "no cut": ("#333333", "d", ":"),
    "scratch": ("#666666", "x", ":"),
}
_PLAIN = ("#333333", ".", "-")


def draw_all(results: Sequence[Plain], folder: Path) -> dict[str, Path]:
    """A picture for each experiment, as peers-EXPERIMENT.png; by that name."""
    found = {}
    for experiment in dict.fromkeys(name for name, _ in names_of(results)):
        networks = [network for name, network in names_of(results) if name == experiment]
        path = folder / f"peers-{experiment}.png"
        _draw(results, experiment, networks, path)
        found[path.name] = path
    return found


def _draw(results: Sequence[Plain], experiment: str, networks: Sequence[str], path: Path) -> None:
    """A row for each network, a column for each kind of cost; the other way round if there is one kind only."""
    every = {network: lines_of(results, experiment, network) for network in networks}
    sizes = {size for lines in every.values() for points in lines.values() for p in points for size in p.latency}
    kinds = ["units"] if experiment == "units" else ["flops", *sorted(sizes, key=int)]
    down, across = (len(networks), len(kinds)) if len(kinds) > 1 else (1, len(networks))
    width = 1.2 + 3.4 * across
    figure, grid = new_figure((width, 0.9 + 2.7 * down), down, across, sharey="row" if len(kinds) > 1 else "none")
    for place, kind in enumerate(kinds):
        for index, network in enumerate(networks):
            axes = grid[index, place] if len(kinds) > 1 else grid[0, index]
            name, (whole, _) = metric_of(results, experiment, network)
            factor, _, up = SCORES.get(name, (1.0, 3, True))
            axes.axhline(factor * whole, color=INK, linewidth=0.6, linestyle=":")
            for method, points in every[network].items():
                _curve(axes, method, points, kind, factor)
            label = f"{name}, %" if factor == 100 else name
            _frame(axes, kind, network if place == 0 or len(kinds) == 1 else "", "" if place else label)
            heights = [factor * p.after[0] for points in every[network].values() for p in points if p.after and p.met]
            _window(axes, factor * whole, heights, up=up)
    handles: dict[str, Any] = {}
    for axes in grid.flat:
        handles |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    legend: dict[str, Any] = {"loc": "outside lower center", "fontsize": 8, "frameon": False}
    figure.legend(list(handles.values()), list(handles), ncols=max(2, int(width // 2.4)), **legend)
    figure.savefig(path, dpi=150)


def _curve(axes: Any, method: str, points: Sequence[Point], kind: str, factor: float) -> None:
    color, mark, dash = _STYLES.get(method, _PLAIN)
    places, heights, spreads = [], [], []
    for point in points:
        cost = {"flops": point.flops, "units": point.reached}.get(kind, point.latency.get(kind))
        if point.after is not None and cost is not None:
            places.append(cost[0])
            heights.append(factor * point.after[0])
            spreads.append(factor * point.after[1])
    style: dict[str, Any] = {"color": color, "marker": mark, "linestyle": dash, "markersize": 4, "linewidth": 1.1}
    axes.errorbar(places, heights, yerr=spreads, capsize=2, elinewidth=0.7, label=method, **style)


def _frame(axes: Any, kind: str, title: str, label: str) -> None:
    known = {"flops": "FLOPs, of the original's", "units": "nonlinear units, of the original's"}
    axes.set_xlabel(known.get(kind, f"latency at batch {kind}, of the original's"), fontsize=8)
    axes.set_title(title, fontsize=9)
    axes.set_ylabel(label, fontsize=9)
    if kind == "units":
        axes.set_xscale("log")
        shares = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
        low, high = axes.get_xlim()
        axes.set_xticks(shares, [f"{share:.0%}" for share in shares])
        axes.set_xlim(low, high)
        axes.minorticks_off()


def _window(axes: Any, whole: float, heights: Sequence[float], *, up: bool) -> None:
    """Do not let a few models that have forgotten everything, or miss their budget, flatten all others."""
    low, high = axes.get_ylim()
    end = 0.65 * whole if up else 3 * whole
    inside = [height for height in heights if (height > end if up else height < end)]
    if 3 * len(inside) < 2 * len(heights):
        return
    if up:
        axes.set_ylim(max(low, end), min(high, 1.03 * max(whole, *heights)))  # an error bar may reach far
    else:
        axes.set_ylim(low, min(high, end, 1.05 * max(whole, *heights)))
