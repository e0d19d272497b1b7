"""The charts of a report as inline SVG: latencies with their spread, trials of the search, the course of training."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from markupsafe import Markup

from linearize.report.svg import WIDTH, Axis, circle, group, line, path, picture, rectangle, short, text
from linearize.report.timing import Ratio, Timing
from linearize.report.trial import Trial

__all__ = ["curves", "in_seconds", "latencies", "trials"]

_CURVES = ("loss", "accuracy", "score", "eval_loss", "share", "lr")
_HEIGHT = 130.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 8.0, WIDTH - 8.0, 24.0, _HEIGHT - 18.0
_DOTS = 60  # samples that are drawn of one measurement


def in_seconds(value: float) -> str:
    """A time with a unit that fits.

    Examples:
        >>> in_seconds(0.00123), in_seconds(2.0), in_seconds(4.5e-5)
        ('1.23 ms', '2 s', '45 us')
    """
    for size, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "us")):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value / 1e-9:.3g} ns"


def latencies(timings: Sequence[Timing], ratios: Sequence[Ratio]) -> Markup:
    """Each model at each batch size: a bar to the median, a line over the quartiles, a dot for each measurement."""
    by_key = {(r.model, r.batch_size, r.compiled): r for r in ratios}
    axis = Axis([t.q3 for t in timings] + [max(t.samples, default=0.0) for t in timings], 0.0, WIDTH - 4.0, zero=True)
    parts, names, y = [], [], 0.0
    for place, timing in enumerate(timings):
        ratio = by_key.get((timing.model, timing.batch_size, timing.compiled))
        title = f"batch {timing.batch_size}" + ", compiled" * timing.compiled
        if not place or (timing.batch_size, timing.compiled) != _setting(timings[place - 1]):
            y += 22 if place else 14
            parts.append(text(0, y, title, "strong"))
            y += 6
        told = f"{timing.model}: {in_seconds(timing.median)} [{in_seconds(timing.q1)}, {in_seconds(timing.q3)}]"
        told += "" if ratio is None else f", ratio {ratio}"
        names.append(f"{title}, {told}")
        parts.append(text(0, y + 11, told, "label"))
        parts.append(group(_bar(timing, axis, y + 16, "before" if ratio is None else "after"), told))
        y += 34
    return picture("Latency. " + "; ".join(names), parts, y + 2)


def _setting(timing: Timing) -> tuple[int, bool]:
    return timing.batch_size, timing.compiled


def _bar(timing: Timing, axis: Axis, y: float, kind: str) -> list[Markup]:
    parts = [rectangle(0, y, axis(timing.median), 12, kind)]
    parts += [circle(axis(sample), y + 6, 1.5, "sample") for sample in timing.samples[:_DOTS]]
    spread = [(timing.q1, timing.q3)]
    parts += [line(axis(low), y + 6, axis(high), y + 6, "spread") for low, high in spread]
    parts += [line(axis(end), y + 2, axis(end), y + 10, "spread") for end in (timing.q1, timing.q3)]
    return parts


def trials(tried: Sequence[Trial]) -> Markup:
    """A dot for each plan, by its real loss; the least so far is a line; a cross is a plan that was given up."""
    losses = [trial.loss for trial in tried if trial.loss is not None]
    across = Axis([0.0, max(1.0, len(tried) - 1.0)], _LEFT + 4, _RIGHT - 4)
    up = Axis(losses, _BOTTOM - 4, _TOP + 14)
    parts = [line(_LEFT, _BOTTOM, _RIGHT, _BOTTOM, "rule")]
    steps: list[tuple[float, float]] = []
    for place, trial in enumerate(tried):
        x = across(place)
        if trial.loss is None:
            parts.append(group([text(x, _TOP + 4, "×", "given-up", "middle")], f"{trial.name}: given up"))
            continue
        y = up(trial.loss)
        if trial.wins:
            steps += [(x, steps[-1][1]), (x, y)] if steps else [(x, y)]
        dot = circle(x, y, 4, "won" if trial.wins else "lost")
        parts.append(group([dot], f"{trial.name}: {short(trial.loss)}"))
    if steps:
        parts.insert(1, path([*steps, (_RIGHT - 4, steps[-1][1])], "best"))
    scale = " (logarithmic)" if up.logarithmic else ""
    ends = f"{short(up.low)} to {short(up.high)}{scale}" if losses else "no plan was measured to the end"
    parts.append(text(0, 11, f"real loss of {len(tried)} plans: {ends}", "label"))
    parts.append(text(_LEFT, _HEIGHT - 4, "first", "label"))
    parts.append(text(_RIGHT, _HEIGHT - 4, "last", "label", "end"))
    best = next((trial for trial in reversed(tried) if trial.wins), None)
    name = f"Search: {len(tried)} plans tried, real loss {ends}"
    name += "" if best is None else f"; the best is the one {best.name}"
    return picture(name, parts, _HEIGHT)


def curves(history: Sequence[Mapping[str, float]]) -> list[Markup]:
    """A chart for each figure of training that readers look for."""
    names = [name for name in _CURVES if any(name in record for record in history)]
    return [curve(name, history) for name in names]


def curve(name: str, history: Sequence[Mapping[str, float]]) -> Markup:
    """One figure over the epochs."""
    points = [(float(r.get("epoch", i + 1)), float(r[name])) for i, r in enumerate(history) if name in r]
    points = [(epoch, value) for epoch, value in points if math.isfinite(value)]
    across = Axis([epoch for epoch, _ in points], _LEFT + 4, _RIGHT - 4)
    up = Axis([value for _, value in points], _BOTTOM - 4, _TOP + 4)
    places = [(across(epoch), up(value)) for epoch, value in points]
    told = f"{name}: {short(points[0][1])} → {short(points[-1][1])}" if points else f"{name}: none finite"
    parts = [line(_LEFT, _BOTTOM, _RIGHT, _BOTTOM, "rule"), path(places, "course")]
    for (x, y), (epoch, value) in zip(places, points, strict=True):
        parts.append(group([circle(x, y, 3, "won")], f"epoch {epoch:.0f}: {short(value)}"))
    parts.append(text(0, 11, told, "strong"))
    if points:
        parts.append(text(_LEFT, _HEIGHT - 4, f"epoch {points[0][0]:.0f}", "label"))
        parts.append(text(_RIGHT, _HEIGHT - 4, f"epoch {points[-1][0]:.0f}", "label", "end"))
    return picture(f"Training, {told} over {len(points)} epochs", parts, _HEIGHT)
