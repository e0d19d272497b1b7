"""Pictures of the nonlinear advantage: moments, decay, cores, tangent kernel."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.papers.findings import LOST, MIDDLE, RULES, cores_at, measure, of
from benchmarks.papers.moments import CROSSED, MOMENTS
from benchmarks.papers.pictures import COLORS, INK, MARKS, new_figure
from benchmarks.papers.statistics import mean_interval
from benchmarks.runs import Plain

__all__ = ["draw_all"]

_GREY = "#9a9a9a"
Values = dict[Any, list[float]]


def draw_all(results: Sequence[Plain], folder: Path) -> dict[str, Path]:
    """Every picture whose runs are there: name where it is committed, and file."""
    plans: dict[str, tuple[str, Callable[[list[Plain], Path], None]]] = {
        "moments": ("moments", draw_moments),
        "decay": ("cores", draw_decay),
        "cores": ("cores", draw_cores),
    }
    made = {}
    for name, (experiment, draw) in plans.items():
        runs = of(results, experiment)
        if runs:
            made[f"papers-{name}.png"] = folder / f"{name}.png"
            draw(runs, folder / f"{name}.png")
    kernel = of(results, "kernel")
    if kernel:
        made["papers-kernel.png"] = folder / "kernel.png"
        draw_kernel(kernel, [run for run in of(results, "moments") if run["name"] == "resnet-8"], folder / "kernel.png")
    return made


def gathered(runs: Sequence[Plain]) -> dict[float, Values]:
    """Scores in percent of all seeds, by share and moment."""
    found: dict[float, Values] = {}
    for run in runs:
        for row in run["rows"]:
            found.setdefault(row["share"], {}).setdefault(row["moment"], []).append(100 * row[measure(run)])
    return dict(sorted(found.items()))


def with_spread(axes: Any, places: Sequence[float], values: Sequence[Sequence[float]], **style: Any) -> None:
    """Means with the range of the seeds."""
    means = [sum(each) / len(each) for each in values]
    below = [mean - min(each) for mean, each in zip(means, values, strict=True)]
    above = [max(each) - mean for mean, each in zip(means, values, strict=True)]
    label = style.pop("label", None)
    axes.errorbar(places, means, yerr=[below, above], capsize=2, linewidth=1.2, markersize=4, **style)
    axes.plot([], [], markersize=4, label=label, **style)


def draw_moments(runs: list[Plain], path: Path) -> None:
    """A panel for each network: the score over the moment at which channels became linear."""
    names = list(dict.fromkeys(run["name"] for run in runs))
    rows = -(-len(names) // 3)
    figure, grid = new_figure((10, 2.7 * rows), rows, min(3, len(names)))
    shares = sorted({row["share"] for run in runs for row in run["rows"]})
    look = {share: (COLORS[place % 4], MARKS[place % 4]) for place, share in enumerate(shares)}
    for axes, name in zip(grid.flat, names, strict=False):
        draw_network(axes, [run for run in runs if run["name"] == name], look)
        axes.set_title(name, loc="left", fontsize=9, fontweight="bold")
    for axes in list(grid.flat)[len(names) :]:
        axes.set_visible(False)
    figure.legend(*legend_of(grid.flat), loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    figure.savefig(path, dpi=160)


def legend_of(panels: Any) -> tuple[list[Any], list[str]]:
    """Each label of some panels once."""
    found: dict[str, Any] = {}
    for axes in panels:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    return list(found.values()), list(found)


def draw_network(axes: Any, runs: Sequence[Plain], look: dict[float, tuple[str, str]]) -> None:
    """One panel of `draw_moments`."""
    dense = [100 * run["dense"][measure(run)] for run in runs]
    axes.axhspan(min(dense), max(dense), color=_GREY, alpha=0.35, linewidth=0, label="no channel linear")
    for share, found in gathered(runs).items():
        color, mark = look[share]
        moments = [name for name in MOMENTS if name in found]
        places = [list(MOMENTS).index(name) for name in moments]
        values = [found[name] for name in moments]
        with_spread(axes, places, values, color=color, marker=mark, label=f"{share:.0%} linear")
        for name, (moment, _) in CROSSED.items():
            if name in found:
                style = {"color": color, "marker": mark, "markerfacecolor": "white", "linestyle": "none"}
                place = list(MOMENTS).index(moment) + (0.22 if moment == "at the start" else -0.22)
                with_spread(axes, [place], [found[name]], label=f"{share:.0%}, the other's choice", **style)
    axes.set_xticks(range(len(MOMENTS)), ["start", *list(MOMENTS)[1:]], fontsize=8)
    axes.set_xlim(-0.3, len(MOMENTS) - 0.7)
    axes.set_ylabel(f"{measure(runs[0])}, %", fontsize=8)


def draw_decay(runs: list[Plain], path: Path) -> None:
    """While the prior acts: accuracy, effective depth and effective width; over depth above, over classes below."""
    figure, grid = new_figure((10, 5.4), 2, 3)
    series = [
        ("depth", [run for run in runs if run["classes"] == 10], "depth {}"),
        ("classes", [run for run in runs if run["depth"] == min(r["depth"] for r in runs)], "{} classes"),
    ]
    for row, (key, chosen, text) in zip(grid, series, strict=True):
        for value, color in zip(sorted({run[key] for run in chosen}), COLORS, strict=False):
            for place, run in enumerate(r for r in chosen if r[key] == value):
                label = text.format(value) if place == 0 else None
                draw_curve(row, run["curve"], color, label)
        row[0].set_xlabel("linear channels, %", fontsize=8)
        row[0].set_ylabel("accuracy, %", fontsize=8)
        for axes, name in zip(row[1:], ("effective depth, units", "effective width, channels"), strict=True):
            axes.set_xscale("log")
            axes.set_xlabel("weight of the prior", fontsize=8)
            axes.set_ylabel(name, fontsize=8)
            axes.axvline(MIDDLE, color=_GREY, linewidth=0.8, linestyle=":")
        row[0].legend(fontsize=8, frameon=False, loc="lower left")
    figure.savefig(path, dpi=160)


def draw_curve(row: Sequence[Any], curve: Sequence[Plain], color: str, label: str | None) -> None:
    """One run in the three panels of a row."""
    style = {"color": color, "linewidth": 1.0, "alpha": 0.85}
    row[0].plot([100 * (1 - r["share"]) for r in curve], [100 * r["accuracy"] for r in curve], label=label, **style)
    weights = [r["weight"] for r in curve]
    row[1].plot(weights, [r["depth"] for r in curve], **style)
    row[2].plot(weights, [r["width"] for r in curve], **style)


def draw_cores(runs: list[Plain], path: Path) -> None:
    """Depth and width of the cores over depth of the network and number of classes, by both rules of comparison."""
    figure, ((*panels,),) = new_figure((10, 3.2), 1, 4)
    series = [
        ("depth", [run for run in runs if run["classes"] == 10], "depth of the ResNet"),
        ("classes", [run for run in runs if run["depth"] == min(r["depth"] for r in runs)], "classes"),
    ]
    texts = {"equal accuracy": f"at most {100 * LOST:.0f} points lost", "equal pressure": f"prior's weight {MIDDLE}"}
    for index, (key, chosen, label) in enumerate(series):
        for offset, (size, name) in enumerate((("depth", "effective depth, units"), ("width", "effective width"))):
            axes = panels[2 * index + offset]
            whole = cores_at(chosen, key, lambda run: run["curve"][0])
            places = list(range(len(whole)))
            first = [sum(v[size]) / len(v[size]) for v in whole.values()]
            axes.plot(places, first, color=_GREY, linestyle="--", linewidth=1, label="before the prior acts")
            for (rule, row_of), color, mark in zip(RULES.items(), COLORS, MARKS, strict=False):
                found = cores_at(chosen, key, row_of)
                values = [v[size] for v in found.values()]
                with_spread(axes, places, values, color=color, marker=mark, label=texts[rule])
            axes.set_xticks(places, [str(value) for value in whole])
            axes.set_xlim(-0.3, len(places) - 0.7)
            axes.set_ylim(bottom=0)
            axes.set_xlabel(label, fontsize=8)
            axes.set_ylabel(name, fontsize=8)
    figure.legend(*legend_of(panels[:1]), loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    figure.savefig(path, dpi=160)


def draw_kernel(runs: list[Plain], moments: Sequence[Plain], path: Path) -> None:
    """Distance and effective rank of the tangent kernel over training, and what linearising then costs."""
    figure, ((left, right),) = new_figure((10, 3.3), 1, 2)
    ranks = left.twinx()
    ranks.spines["top"].set_visible(False)
    ranks.tick_params(labelsize=8)
    for run in runs:
        steps = [100 * row["step"] for row in run["curve"]]
        left.plot(steps, [row["distance"] for row in run["curve"]], color=COLORS[0], marker="o", markersize=3)
        values = [row["effective_rank"] for row in run["curve"]]
        ranks.plot(steps, values, color=COLORS[1], linestyle="--", marker="s", markersize=3)
    left.set_xlabel("share of the training steps, %", fontsize=9)
    left.set_ylabel("distance of the kernel from its start", color=COLORS[0], fontsize=9)
    ranks.set_ylabel("effective rank", color=COLORS[1], fontsize=9)
    left.set_ylim(0, 1)
    ranks.set_ylim(bottom=0)
    for (share, found), color, mark in zip(gathered(moments).items(), COLORS, MARKS, strict=False):
        names = [name for name in MOMENTS if name in found]
        places = [100 * MOMENTS[name] for name in names]
        values = [found[name] for name in names]
        with_spread(right, places, values, color=color, marker=mark, label=f"{share:.0%} linear")
    dense = [100 * run["dense"][measure(run)] for run in moments]
    if dense:
        middle, _ = mean_interval(dense)
        right.axhline(middle, color=INK, linewidth=0.8, linestyle=":", label="no channel linear")
        right.legend(fontsize=8, frameon=False)
    right.set_xlim(left.get_xlim())
    right.set_xlabel("share of the training steps when channels become linear, %", fontsize=9)
    right.set_ylabel("accuracy at the end, %", fontsize=9)
    figure.savefig(path, dpi=160)
