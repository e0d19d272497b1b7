"""Fit each channel's straight line to the inputs that the channel really gets, in one pass over data.

Least squares of `h = act(x)` on `slope * x + intercept`, per channel. A channel that is always on gets (1,
0), a dead one (0, 0), both with residual zero: they can be collapsed with no change of function.

Shape letters: C channels of a gate, R rows (every token or pixel of every sample).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from linearize import checks
from linearize.algebra.moments import Moments, SiteCalibration
from linearize.errors import DataError, UsageError
from linearize.gate import ChannelGate, gates
from linearize.running.batches import length_of, read_batches
from linearize.running.devices import check_whole
from linearize.running.models import eagerly, evaluating
from linearize.running.progress import progress_bar

__all__ = ["Calibration", "SiteCalibration", "calibrate", "padding_mask", "stream"]


@dataclass(frozen=True)
class Calibration:
    """What `calibrate` found, by site name in order of execution. Prints as a table."""

    sites: dict[str, SiteCalibration] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
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
class _Fitter:
    """Moments of every gate, checked batch by batch."""

    moments: dict[str, Moments] = field(default_factory=dict)

    def watch(self, name: str, gate: ChannelGate, x: Tensor, h: Tensor) -> None:
        if name not in self.moments:
            self.moments[name] = Moments(gate.channels, "cpu" if x.device.type == "mps" else x.device)
        self.moments[name].update(x, h)

    def check(self, index: int) -> None:
        finite = {name: moments.finite.cpu() for name, moments in self.moments.items()}
        bad = next((name for name, flag in finite.items() if not flag), None)
        if bad is not None:
            remedy = "Check this batch, and the weights before this site."
            raise DataError(bad, f"found NaN or infinity at this activation in batch {index}", remedy)


def calibrate(model: nn.Module, batches: Iterable[Any], *, progress: bool = True) -> Calibration:
    """Fit the line of every gate by least squares, in one pass that stores no activations.

    Sets `slope` and `intercept` of every channel that is not linear yet; a linear channel keeps the line that
    is in use. `alpha` and `frozen` stay as they are, and so does the function of a model whose alphas are 0.

    Args:
        model: a model with gates. It runs in eval mode, and is left in the mode it was in; compiled code in it rests,
            since it would not see what is put on to look at the activations.
        batches: any iterable of tensors, tuples (inputs, labels) or dicts of keyword arguments. Where they hold an
            `attention_mask` (B, T) that fits a site's input (B, T, C), in a nested dict, too, padding is left out; a
            decoder's mask is its own, or follows from labels that are not -100 where these are its input.
        progress: show a bar, if standard error is a terminal.

    Returns:
        The lines and what they leave unexplained, by site. Gates that no batch reached have count 0.

    Raises:
        UsageError: the model has no gates.
        DataError: there are no batches, one does not go through the model, or NaN or infinity turns up (the site is
            named; no gate is changed).

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), ChannelGate(nn.ReLU(), 2))
        >>> _ = model[0].weight.data.copy_(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]))
        >>> _ = model[0].bias.data.zero_()
        >>> found = calibrate(model, [torch.tensor([[1.0, 0.0], [2.0, 0.0]])])  # one channel on, one off
        >>> model[1].slope.tolist(), found.sites["1"].residual.tolist()
        ([1.0, 0.0], [0.0, 0.0])
    """
    checks.boolean("progress", progress)
    fitter = _Fitter()
    stream(model, batches, fitter.watch, after_batch=fitter.check, progress=progress)
    sites = {}
    for name, gate in gates(model).items():
        moments = fitter.moments.get(name, Moments(gate.channels))
        sites[name] = moments.fit(constant=gate.gated_unit)
    for name, gate in gates(model).items():
        if sites[name].count:
            _set_line(gate, sites[name])
    return Calibration(sites)


@torch.no_grad()
def _set_line(gate: ChannelGate, site: SiteCalibration) -> None:
    for buffer, fitted in ((gate.slope, site.slope), (gate.intercept, site.intercept)):
        buffer.copy_(torch.where(gate.linear, buffer, fitted.to(buffer)))


def stream(
    model: nn.Module,
    batches: Iterable[Any],
    watch: Callable[[str, ChannelGate, Tensor, Tensor], None],
    *,
    after_batch: Callable[[int], None] = lambda _: None,
    progress: bool = True,
) -> int:
    """Run `model` over `batches` and show each gate's activation to `watch(name, gate, x, h)`, rows first.

    x and h are (R, C): the channel axis last, all others made rows, padding left out. The model runs in eval
    mode without gradients and is left in the mode it was in.

    Returns:
        The number of batches.

    Raises:
        UsageError: the model has no gates.
        DataError: there are no batches, or a batch is of no known form, or does not go through the model.
    """
    model = checks.module("model", model)
    model = getattr(model, "_orig_mod", model)  # compiled
    named = gates(model)
    for gate in named.values():
        gate.check()
    if isinstance(batches, str | bytes | Mapping | Tensor) or not hasattr(batches, "__iter__"):
        remedy = "Pass an iterable of batches, such as a list of tensors or a DataLoader."
        raise DataError("batches", f"found a {type(batches).__name__}", remedy)
    if not named:
        raise UsageError("calibrate", "found no gate in the model", "Pass linearize.convert(model).")
    check_whole(model, values=True)
    current: dict[str, Tensor] = {}

    def see(name: str, x: Tensor, h: Tensor) -> None:
        gate = named[name]
        watch(name, gate, *_rows(x, h, gate.axis, padding_mask(model, name, current)))

    count = 0
    handles = list(_hooks(named, see))
    try:
        with eagerly(), evaluating(model), progress_bar("calibrate", length_of(batches), enabled=progress) as advance:
            for batch in read_batches(model, batches):
                current.clear()
                current.update(batch.masks or {})
                batch.checked(model, count)
                after_batch(count)
                count += 1
                advance("")
    finally:
        for handle in handles:
            handle.remove()
    if not count:
        raise DataError("batches", "found none", "Pass at least one batch (a generator is empty after its first use).")
    return count


def _hooks(named: Mapping[str, ChannelGate], see: Callable[[str, Tensor, Tensor], None]) -> Iterator[RemovableHandle]:
    """Show each gate's input and its activation's output to `see`.

    Several gates may hold one activation object, and the model may call it without any gate: an activation is told by
    the gate that it runs in.
    """
    running: list[str] = []

    def enter(name: str) -> Callable[..., None]:
        return lambda *_: running.append(name)

    def leave(*_: Any) -> None:
        running.pop()

    def inside(activation: nn.Module, inputs: tuple[Tensor, ...], h: Tensor) -> None:
        if running and named[running[-1]].activation is activation:
            see(running[-1], inputs[0], h)

    for name, gate in named.items():
        yield gate.register_forward_pre_hook(enter(name))
        yield gate.register_forward_hook(leave, always_call=True)
    for activation in {id(gate.activation): gate.activation for gate in named.values()}.values():
        yield activation.register_forward_hook(inside)


def padding_mask(model: nn.Module, name: str, masks: Mapping[str, Tensor] | None) -> Tensor | None:
    """The padding mask, of those of a batch, that belongs to a site."""
    masks, key = masks or {}, "attention_mask"
    both = getattr(getattr(model, "config", None), "is_encoder_decoder", False) or "decoder_attention_mask" in masks
    if both and any("decoder" in part for part in name.split(".")):
        key = "decoder_attention_mask"  # the two sequences may be of the same length by chance
    return masks.get(key)


def _rows(x: Tensor, h: Tensor, axis: int, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Both as (R, C), without the rows that a mask (B, T) marks as padding."""
    x, h = x.movedim(axis, -1), h.movedim(axis, -1)
    if mask is not None:
        if x.shape[:-1] == mask.shape:
            return x[mask.bool()], h[mask.bool()]
        if x.shape[:-1] == (mask.numel(),):  # tokens were flattened before the site
            return x[mask.flatten().bool()], h[mask.flatten().bool()]
    return x.reshape(-1, x.shape[-1]), h.reshape(-1, h.shape[-1])
