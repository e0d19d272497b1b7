"""Calibration: fit the line of each channel to the inputs that the channel gets on data, in one pass.

The line `slope * x + intercept` is fitted to `h = act(x)` by least squares, for each channel. A ReLU channel that is
always on gets (1, 0), and one that is never on gets (0, 0). Both have residual zero, so such channels can be collapsed
without any change of function on these data.

Shape letters: C channels of a gate, R rows (every token or pixel of every sample).
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from linearize import checks
from linearize.algebra.moments import Moments, SiteCalibration
from linearize.data.text import read_if_text
from linearize.errors import DataError, UsageError
from linearize.gating.gate import ChannelGate, gates
from linearize.running.devices import check_whole
from linearize.running.passes import Moment, run_passes

__all__ = ["Calibration", "LineCollector", "SiteCalibration", "calibrate", "fit_lines", "line_collectors"]


@dataclass(frozen=True)
class Calibration:
    """The fitted lines by site name, in order of execution. It prints as a table."""

    sites: dict[str, SiteCalibration] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The same as plain data, ready for JSON."""
        return {name: site.to_dict() for name, site in self.sites.items()}

    def __str__(self) -> str:
        head = ("site", "channels", "rows", "exact", "< 1% left", "< 5% left", "median left")
        rows = [head, *(_row(name, site) for name, site in self.sites.items())]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in rows]
        return "\n".join("  ".join(line).rstrip() for line in lines)


def _row(name: str, site: SiteCalibration) -> tuple[str, ...]:
    left = site.unexplained
    counts = (int((left == 0).sum()), int((left < 0.01).sum()), int((left < 0.05).sum()))
    return (name, str(len(left)), str(site.count), *map(str, counts), f"{float(left.median()):.1%}")


@dataclass
class LineCollector:
    """Collects moments of the inputs of one gate and of the outputs of its activation.

    Attributes:
        name: of the site.
        gate: whose activation is watched.
        moments: found so far.
    """

    name: str
    gate: ChannelGate
    moments: Moments = field(init=False)
    kind: str = field(default="line", init=False)
    gradients: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        device = self.gate.alpha.device
        self.moments = Moments(self.gate.channels, "cpu" if device.type == "mps" else device)

    @property
    def memory(self) -> float:
        """Bytes that the sums take."""
        return 56.0 * self.gate.channels

    def attach(self, now: Moment) -> Iterator[RemovableHandle]:
        """Watch the activation, while its gate runs.

        Several gates may hold one activation object, and the model may call it without any gate: what counts is the
        call that the gate makes.
        """
        running: list[bool] = []

        def see(_: nn.Module, inputs: tuple[Tensor, ...], h: Tensor) -> None:
            if running:
                self.moments.update(*_rows(inputs[0].detach(), h.detach(), self.gate.axis, now.mask(self.name)))

        yield self.gate.register_forward_pre_hook(lambda *_: running.append(True))
        yield self.gate.register_forward_hook(lambda *_: (running.pop(), None)[1], always_call=True)
        yield self.gate.activation.register_forward_hook(see)

    def take(self, now: Moment) -> None:
        """Does nothing, because rows are counted as they pass, before anything overwrites them."""

    @property
    def finite(self) -> bool:
        """Whether all sums are finite."""
        return bool(self.moments.finite)

    def merge(self, other: LineCollector) -> None:
        """Add the sums of another collector, from other batches."""
        self.moments.merge(other.moments)

    def state(self) -> dict[str, Any]:
        """The sums, as plain values and tensors."""
        return self.moments.state()

    def restore(self, state: Mapping[str, Any]) -> None:
        """Restore the result of `state`."""
        self.moments.restore(state)


def calibrate(
    model: nn.Module,
    batches: Iterable[Any] | os.PathLike[str],
    *,
    tokenizer: Any = None,
    context: int | None = None,
    column: str | None = None,
    progress: bool = True,
) -> Calibration:
    """Fit the line of every channel to its inputs on data, by least squares. One pass, and no activation is stored.

    This sets `slope` and `intercept` of every channel that is not linear yet. A linear channel keeps its line. `alpha`
    and `frozen` do not change. If all alphas are 0, the function of the model does not change either.

    Args:
        model: a model with gates. It runs in eval mode, and is put back into its own mode afterwards. Compiled code in
            it is run eagerly, because it would not call the hooks that read the activations.
        batches: any iterable of tensors, tuples (inputs, labels) or dicts of keyword arguments. If a batch holds an
            `attention_mask` (B, T) that fits a site's input (B, T, C), also in a nested dict, padding is left out. For
            a decoder, its own mask is used. If its input is made from labels, the labels that are -100 are padding.
            Or text, as for `linearize.compress`; nothing of it is held back.
        tokenizer: with text: a tokenizer, or the path of one. None takes the one in the model's folder.
        context: with text: number of tokens in a block.
        column: with text: the column that holds it.
        progress: show a bar, if standard error is a terminal.

    Returns:
        For each site, the lines and the variance that they leave unexplained. A gate that no batch reached has count 0.

    Raises:
        UsageError: the model has no gates.
        DataError: there are no batches, one does not go through the model, or NaN or infinity turns up (the site is
            named; no gate is changed).

    Examples:
        >>> model = nn.Sequential(nn.Linear(2, 2), ChannelGate(nn.ReLU(), 2))
        >>> _ = model[0].weight.data.copy_(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]))
        >>> _ = model[0].bias.data.zero_()
        >>> found = calibrate(model, [torch.tensor([[1.0, 0.0], [2.0, 0.0]])])  # one channel on, one off
        >>> model[1].slope.tolist(), found.sites["1"].residual.tolist()
        ([1.0, 0.0], [0.0, 0.0])
    """
    checks.boolean("progress", progress)
    model = checks.module("model", model)
    model = getattr(model, "_orig_mod", model)  # compiled
    source = read_if_text(batches, model, tokenizer=tokenizer, context=context, column=column, hold_back=False)
    batches = batches if source is None else source.train
    if isinstance(batches, str | bytes | Mapping) or hasattr(batches, "__array__") or not isinstance(batches, Iterable):
        remedy = "Pass an iterable of batches, such as a list of tensors or a DataLoader."
        raise DataError("batches", f"found a {type(batches).__name__}", remedy)
    collectors = line_collectors(model)
    check_whole(model, values=True)
    run_passes(model, batches, collectors, memory=math.inf, label="calibrate", progress=progress)
    return fit_lines(model, collectors)


def line_collectors(model: nn.Module) -> list[LineCollector]:
    """A collector for every gate.

    Raises:
        UsageError: the model has none.
    """
    named = gates(model)
    if not named:
        raise UsageError("calibrate", "found no gate in the model", "Pass linearize.convert(model).")
    for gate in named.values():
        gate.check()
    return [LineCollector(name, gate) for name, gate in named.items()]


def fit_lines(model: nn.Module, collectors: Iterable[LineCollector]) -> Calibration:
    """Give every gate the line that its collector implies."""
    named = gates(model)
    sites = {c.name: c.moments.fit(constant=named[c.name].gated_unit) for c in collectors}
    for name, site in sites.items():
        if site.count:
            _set_line(named[name], site)
    return Calibration(sites)


@torch.no_grad()
def _set_line(gate: ChannelGate, site: SiteCalibration) -> None:
    for buffer, fitted in ((gate.slope, site.slope), (gate.intercept, site.intercept)):
        buffer.copy_(torch.where(gate.linear, buffer, fitted.to(buffer)))


def _rows(x: Tensor, h: Tensor, axis: int, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Both as (R, C), without the rows that a mask (B, T) marks as padding."""
    x, h = x.movedim(axis, -1), h.movedim(axis, -1)
    if mask is not None:
        if x.shape[:-1] == mask.shape:
            return x[mask.bool()], h[mask.bool()]
        if x.shape[:-1] == (mask.numel(),):  # tokens were flattened before the site
            return x[mask.flatten().bool()], h[mask.flatten().bool()]
    return x.reshape(-1, x.shape[-1]), h.reshape(-1, h.shape[-1])
