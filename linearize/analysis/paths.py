"""Average path length: how many nonlinear units lie on a path from a model's input to its output.

Source: Ali Mehmeti-Goepel and Disselhoff, "Nonlinear Advantage: Trained Networks Might Not Be As Complex as You
Think", ICML 2023. Shape letters: C output channels, K lengths 0 .. K - 1.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn

from linearize import checks
from linearize.analysis.canvas import FIRST, SECOND, head, new_figure, write_picture
from linearize.analysis.flow import Flow, average, passed, reduced, source
from linearize.analysis.rules import Rules
from linearize.analysis.units import Unit, check_weighting, find_units, inputs_of
from linearize.convert import eager_model
from linearize.errors import CaptureError
from linearize.graph.capture import CONSTANT, Capture, capture, is_check, shape
from linearize.graph.channels import channel_axes
from linearize.graph.ops import is_inplace
from linearize.text_table import render

__all__ = ["OutputPaths", "PathGraph", "PathLength", "average_path_length"]

Weighting = Literal["normalized", "unnormalized"]


@dataclass(frozen=True)
class OutputPaths:
    """The paths that end in one output tensor.

    Attributes:
        name: position of the tensor in the model's output, as text.
        distribution: float64 (K,), the share of paths of each length, in nonlinear units; sums to 1.
        channels: float64 (C, K), the same for each channel of the output; all 0 where no path ends.
        log10_paths: decimal logarithm of the number of paths, if they were counted (unnormalized); else None.
    """

    name: str
    distribution: Tensor
    channels: Tensor
    log10_paths: float | None

    @property
    def mean(self) -> float:
        """Mean length, in nonlinear units."""
        return _mean(self.distribution)

    @property
    def channel_means(self) -> Tensor:
        """Mean length for each channel of the output: float64 (C,)."""
        return self.channels @ torch.arange(self.channels.shape[1], dtype=torch.float64)

    def to_dict(self) -> dict[str, Any]:
        """The same as plain data, ready for JSON."""
        return {
            "name": self.name,
            "mean": self.mean,
            "distribution": self.distribution.tolist(),
            "channel_means": self.channel_means.tolist(),
            "log10_paths": self.log10_paths,
        }


@dataclass(frozen=True)
class PathLength:
    """Lengths of the paths of a model, in nonlinear units. `float()` gives the mean. It prints as a table.

    Attributes:
        weighting: "normalized" or "unnormalized".
        distribution: share of the paths of each length over all outputs, float64 (K,); sums to 1.
        outputs: the paths to each output tensor that depends on the input.
        opaque: operations without a rule. They were taken to connect all channels.
    """

    weighting: str
    distribution: Tensor
    outputs: tuple[OutputPaths, ...]
    opaque: tuple[str, ...] = ()

    @property
    def mean(self) -> float:
        """Mean length over all outputs."""
        return _mean(self.distribution)

    def __float__(self) -> float:
        return self.mean

    def to_dict(self) -> dict[str, Any]:
        """The same as plain data, ready for JSON."""
        return {
            "weighting": self.weighting,
            "mean": self.mean,
            "distribution": self.distribution.tolist(),
            "outputs": [output.to_dict() for output in self.outputs],
            "opaque": list(self.opaque),
        }

    def draw(self, path: str | os.PathLike[str], title: str = "") -> None:
        """Write a picture of the share of paths of each length."""
        draw_lengths(self, path, title)

    def __str__(self) -> str:
        rows = [
            (
                output.name,
                output.channels.shape[0],
                f"{output.mean:.3f}",
                f"{_spread(output.distribution):.3f}",
                "{}–{}".format(*_range(output.distribution)),
                None if output.log10_paths is None else f"1e{output.log10_paths:.1f}",
            )
            for output in self.outputs
        ]
        table = render(("output", "channels", "mean length", "std", "range", "paths"), rows)
        note = f"\nno rule for: {', '.join(self.opaque)} (taken to connect all channels)" if self.opaque else ""
        return f"{table}\naverage path length {self.mean:.3f} ({self.weighting}){note}"


def average_path_length(
    model: nn.Module, example_inputs: Any = None, *, weighting: Weighting = "normalized"
) -> PathLength:
    """The mean number of nonlinear units on a path from the input of a model to its output.

    A path goes through channels: `L = sum over paths p of w(p) * (nonlinear units on p)`. With "unnormalized" all paths
    have the same weight. With "normalized", `w(p)` is the probability of a random walk from the output backwards. It
    takes each branch of a merge (a sum, a product, a concatenation) with the same probability, and so for each input
    channel of a dense layer. Linear channels of gates and of collapsed models do not count. The result is exact, by
    dynamic programming over the captured graph. `linearize.analysis.rules` lists the rule for each kind of operation.

    Args:
        model: any model that can be captured: plain (all its activations count), converted, or collapsed.
        example_inputs: as for `linearize.convert`; None uses what the model or its library knows.
        weighting: "normalized" or "unnormalized".

    Returns:
        A `PathLength`. `float()` of it is the mean, `.distribution` is the share of each length, and `.outputs` gives
        the same for each output and each of its channels.

    Raises:
        CaptureError: the model cannot be captured, or no output depends on the input.
        UsageError: there is no such weighting.

    Examples:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> float(average_path_length(net, torch.randn(1, 4)))
        2.0
    """
    checks.module("model", model)
    check_weighting(weighting)
    return PathGraph.of(model, example_inputs).lengths(weighting)


@dataclass
class PathGraph:
    """A captured model. Its path lengths can be computed again and again while its gates change."""

    captured: Capture
    units: tuple[Unit, ...]
    axes: dict[fx.Node, int] = field(default_factory=dict)

    @classmethod
    def of(cls, model: nn.Module, example_inputs: Any = None) -> PathGraph:
        """Capture a model once.

        Raises:
            CaptureError: it cannot be captured on these inputs.
        """
        model = eager_model(model)
        captured = capture(model, inputs_of(model, example_inputs))
        return cls(captured, find_units(model, captured), channel_axes(captured.graph))

    def lengths(self, weighting: Weighting = "normalized") -> PathLength:
        """The path lengths for the present state of the gates."""
        normalized = check_weighting(weighting)
        found, rules = self._outputs(normalized=normalized, integers=False)
        if not found:  # integer inputs that are not looked up in a table
            found, rules = self._outputs(normalized=normalized, integers=True)
        if not found:
            remedy = "Pass inputs that the outputs are computed from."
            raise CaptureError("average_path_length", "no output depends on a floating input", remedy)
        outputs = [_output(name, flow, axis, sizes, normalized=normalized) for name, flow, axis, sizes in found]
        counts = torch.tensor([0.0 if o.log10_paths is None else o.log10_paths for o in outputs], dtype=torch.float64)
        shares = torch.softmax(counts * math.log(10), 0)
        longest = max(len(output.distribution) for output in outputs)
        total = torch.zeros(longest, dtype=torch.float64)
        for share, output in zip(shares, outputs, strict=True):
            total[: len(output.distribution)] += share * output.distribution
        return PathLength(weighting, total, tuple(outputs), tuple(rules.opaque))

    def _outputs(
        self, *, normalized: bool, integers: bool
    ) -> tuple[list[tuple[str, Flow, int | None, tuple[int, ...]]], Rules]:
        """Name, flow, channel axis and shape of every output that a path leads to."""
        rules = Rules(self.axes, normalized)
        by_output = {unit.output: unit for unit in self.units}
        inside = {node for unit in self.units for node in unit.nodes} - set(by_output)
        found: list[tuple[str, Flow, int | None, tuple[int, ...]]] = []
        for node in self.captured.graph.nodes:
            if node.op == "placeholder":
                rules.states[node] = _input(node, integers=integers)
            elif node.op == "output":
                for index, result in enumerate(self.captured.returned(node)):
                    flow, sizes = rules.flow(result), shape(result)
                    if flow is not None and sizes is not None:
                        found.append((str(index), flow, self.axes.get(result), sizes))
            elif node in by_output:
                unit = by_output[node]
                before = rules.flow(unit.source)
                if before is not None:
                    rules.states[node] = passed(before, unit.nonlinear(), unit.axis, cut=unit.gated_unit)
            elif node.op == "call_function" and node not in inside and not is_check(node) and CONSTANT not in node.meta:
                rules.states[node] = _floating(node, rules.apply(node))
            if is_inplace(node) and isinstance(node.args[0], fx.Node) and node in rules.states:
                rules.states[node.args[0]] = rules.states[node]
        return found, rules


def _input(node: fx.Node, *, integers: bool) -> Flow | None:
    sizes = shape(node)
    if sizes is None or CONSTANT in node.meta:
        return None
    value = node.meta["val"]
    return source(len(sizes)) if integers or value.is_floating_point() or value.is_complex() else None


def _floating(node: fx.Node, state: Any) -> Any:
    """Nothing flows through whole numbers and truth values: they do not change with the input, but jump."""
    value = node.meta.get("val")
    if isinstance(value, Tensor) and not (value.is_floating_point() or value.is_complex()):
        return None
    return state


def _output(name: str, flow: Flow, axis: int | None, sizes: tuple[int, ...], *, normalized: bool) -> OutputPaths:
    if axis is None or axis >= len(sizes):
        axis = len(sizes) - 1 if sizes else None
    if axis is None:
        channels, log = flow.lengths.reshape(1, -1), flow.log.reshape(1)
    else:
        flow = average(flow, [a for a in range(len(sizes)) if a != axis])
        channels = flow.lengths.reshape(flow.grid[axis], -1).expand(sizes[axis], -1)
        log = flow.log.reshape(-1).expand(sizes[axis])
    whole = reduced(Flow(channels, log), 0)
    paths = None if normalized else float(whole.log) / math.log(10)
    return OutputPaths(name, whole.lengths[0], channels, paths)


def _mean(distribution: Tensor) -> float:
    return float(distribution @ torch.arange(len(distribution), dtype=torch.float64))


def _spread(distribution: Tensor) -> float:
    lengths = torch.arange(len(distribution), dtype=torch.float64)
    mean = float(distribution @ lengths)
    return math.sqrt(max(0.0, float(distribution @ (lengths - mean).square())))


def _range(distribution: Tensor) -> tuple[int, int]:
    held = distribution.nonzero().flatten().tolist() or [0]
    return held[0], held[-1]


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
    head(axes, title, f"average path length {found.mean:.2f}")
    write_picture(figure, path)
