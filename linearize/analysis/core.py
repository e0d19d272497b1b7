"""The core network: what of a model is still nonlinear, layer by layer, and how deep that is.

Source: Ali Mehmeti-Goepel and Disselhoff, "Nonlinear Advantage", ICML 2023 (core networks). Shape letter: C channels.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from linearize.analysis.canvas import FIRST, INK, LINEAR, NAMED_ROWS, SECOND, new_figure, write_picture
from linearize.analysis.paths import PathGraph, PathLength, Weighting
from linearize.analysis.units import Unit
from linearize.errors import UsageError
from linearize.text_table import render

__all__ = ["Core", "CoreLayer", "CoreRecorder", "core_network"]


@dataclass(frozen=True)
class CoreLayer:
    """One site of the core network.

    Attributes:
        name, activation: of the site.
        nonlinear: which of its channels are nonlinear, bool (C,).
    """

    name: str
    activation: str
    nonlinear: Tensor

    @property
    def channels(self) -> int:
        """All channels of the site."""
        return self.nonlinear.numel()

    @property
    def width(self) -> int:
        """Effective width: how many of them are nonlinear."""
        return int(self.nonlinear.sum())

    def to_dict(self) -> dict[str, Any]:
        """The same as plain data, ready for JSON."""
        return {
            "name": self.name,
            "activation": self.activation,
            "channels": self.channels,
            "width": self.width,
            "nonlinear": self.nonlinear.nonzero().flatten().tolist(),
        }


@dataclass(frozen=True)
class Core:
    """The core network: what is still nonlinear in a model. It prints as a table.

    Attributes:
        layers: the sites, in order of execution.
        paths: lengths of the model's paths; their mean is the effective depth.
    """

    layers: tuple[CoreLayer, ...]
    paths: PathLength

    @property
    def depth(self) -> float:
        """Effective depth: the average path length, in nonlinear units."""
        return float(self.paths)

    @property
    def width(self) -> float:
        """Effective width: the mean number of nonlinear channels, over the sites that have any."""
        widths = [layer.width for layer in self.layers if layer.width]
        return sum(widths) / len(widths) if widths else 0.0

    @property
    def share(self) -> float:
        """Share of the channels that is nonlinear, 0 to 1."""
        total = sum(layer.channels for layer in self.layers)
        return sum(layer.width for layer in self.layers) / total if total else 0.0

    def to_dict(self) -> dict[str, Any]:
        """The same as plain data, ready for JSON."""
        return {
            "depth": self.depth,
            "width": self.width,
            "share": self.share,
            "layers": [layer.to_dict() for layer in self.layers],
            "paths": self.paths.to_dict(),
        }

    def draw(self, path: str | os.PathLike[str], title: str = "") -> None:
        """Write a picture of the nonlinear channels: a row for each site, a cell for each channel."""
        draw_core(self, path, title)

    def __str__(self) -> str:
        rows = [
            (layer.name, layer.activation, layer.channels, layer.width, f"{layer.width / layer.channels:.1%}")
            for layer in self.layers
        ]
        table = render(("site", "activation", "channels", "nonlinear", "share"), rows)
        return (
            f"{table}\neffective depth {self.depth:.2f} units ({self.paths.weighting}), "
            f"effective width {self.width:.1f} channels, {self.share:.1%} of all channels nonlinear"
        )


def core_network(model: nn.Module, example_inputs: Any = None, *, weighting: Weighting = "normalized") -> Core:
    """The effective width of every site and the effective depth of a model.

    The effective width of a site is the number of its nonlinear channels. The effective depth of the model is its
    average path length. In a plain model, all channels are nonlinear. Gates, and the layers of a collapsed model, show
    which channels are linear.

    Args:
        model: plain, converted or collapsed.
        example_inputs: as for `linearize.convert`; None uses what the model or its library knows.
        weighting: of the paths, as for `average_path_length`.

    Raises:
        CaptureError: the model cannot be captured.

    Examples:
        >>> import linearize
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> gated = linearize.convert(net, torch.randn(1, 4))
        >>> _ = linearize.gates(gated)["1"].linearize_(torch.arange(8) < 6)
        >>> print(core_network(gated))
        site  activation  channels  nonlinear   share
        ----  ----------  --------  ---------  ------
        1     relu               8          2   25.0%
        3     relu               8          8  100.0%
        effective depth 1.25 units (normalized), effective width 5.0 channels, 62.5% of all channels nonlinear
    """
    return _core(PathGraph.of(model, example_inputs), weighting)


def _core(graph: PathGraph, weighting: Weighting) -> Core:
    units: dict[str, Unit] = {}
    for unit in graph.units:
        units.setdefault(unit.name, unit)
    layers = tuple(CoreLayer(unit.name, unit.activation, unit.nonlinear()) for unit in units.values())
    return Core(layers, graph.lengths(weighting))


@dataclass
class CoreRecorder:
    """Records depth and widths of a model's core at each call of `record`, while a prior acts on the gates.

    The model is captured only once. `curve` holds a row of plain data for each call of `record`.

    Examples:
        >>> import linearize
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> gated = linearize.convert(net, torch.randn(1, 4))
        >>> recorder = CoreRecorder.of(gated)
        >>> _ = recorder.record(0)
        >>> _ = linearize.gates(gated)["1"].linearize_(torch.arange(8) < 4)
        >>> recorder.record(1)["depth"]
        0.5
    """

    graph: PathGraph
    weighting: Weighting = "normalized"
    curve: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def of(cls, model: nn.Module, example_inputs: Any = None, *, weighting: Weighting = "normalized") -> CoreRecorder:
        """A recorder for a converted model.

        Raises:
            CaptureError: the model cannot be captured.
        """
        with torch.no_grad():
            return cls(PathGraph.of(model, example_inputs), weighting)

    def record(self, step: float | None = None, **more: Any) -> dict[str, Any]:
        """Add a row: the step (by default the number of rows so far), depth, width, share, widths of all sites.

        Args:
            step: the position on the curve.
            **more: further plain data for the row, such as the accuracy.
        """
        core = _core(self.graph, self.weighting)
        row = {
            "step": len(self.curve) if step is None else step,
            "depth": core.depth,
            "width": core.width,
            "share": core.share,
            "widths": {layer.name: layer.width for layer in core.layers},
            **more,
        }
        self.curve.append(row)
        return row

    def to_dict(self) -> dict[str, Any]:
        """The same as plain data, ready for JSON."""
        return {"weighting": self.weighting, "curve": self.curve}

    def __str__(self) -> str:
        rows = [
            (row["step"], f"{row['depth']:.2f}", f"{row['width']:.1f}", f"{row['share']:.1%}") for row in self.curve
        ]
        return render(("step", "depth", "width", "nonlinear"), rows)

    def draw(self, path: str | os.PathLike[str], title: str = "") -> None:
        """Write a picture of effective depth and width over the steps."""
        draw_curve(self.curve, path, title)


_BINS = 256  # more channels than a picture has room for share a bin, coloured by their nonlinear share


def draw_core(core: Core, path: str | os.PathLike[str], title: str = "") -> None:
    """Draw what is nonlinear: a row for each site, from the input at the top, a cell for each channel.

    Raises:
        UsageError: matplotlib is not installed, or the file cannot be written.
    """
    figure, (axes,) = new_figure((8, 1.4 + 0.26 * min(len(core.layers), NAMED_ROWS)), 1)
    from matplotlib.colors import LinearSegmentedColormap

    colors = LinearSegmentedColormap.from_list("core", [LINEAR, FIRST])
    widest = max((layer.channels for layer in core.layers), default=1)
    for place, layer in enumerate(core.layers):
        edges, values = _row(layer, widest)
        axes.pcolormesh(edges, [place - 0.42, place + 0.42], [values], cmap=colors, vmin=0, vmax=1)
        if len(core.layers) <= NAMED_ROWS:
            text = f" {layer.width} of {layer.channels}"
            axes.text(layer.channels, place, text, va="center", fontsize=7, color=INK)
    if len(core.layers) <= NAMED_ROWS:
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
