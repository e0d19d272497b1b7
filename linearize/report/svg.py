"""Parts of inline SVG pictures: every text is escaped, colours come from the page, and each picture has a name.

Charts are drawn for a width of 360, the width of a phone, and grow with the page up to half as much again.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from markupsafe import Markup

__all__ = ["WIDTH", "Axis", "circle", "group", "line", "path", "picture", "rectangle", "short", "strip", "text"]

WIDTH = 360


class Axis:
    """A map from values to places; logarithmic where values are positive and span more than a factor of 30.

    Args:
        values: what must be on it.
        start, end: places of the least and the largest value.
        zero: whether zero is on it, too; then it is never logarithmic.

    Examples:
        >>> axis = Axis([1.0, 3.0], 0, 100)
        >>> axis(1.0), axis(2.0), axis(3.0)
        (0.0, 50.0, 100.0)
        >>> Axis([1.0, 100.0], 0, 100)(10.0)
        50.0
    """

    def __init__(self, values: Iterable[float], start: float, end: float, *, zero: bool = False) -> None:
        known = [value for value in values if math.isfinite(value)] or [0.0]
        self.low, self.high = min(known), max(known)
        if zero:
            self.low, self.high = min(0.0, self.low), max(0.0, self.high)
        self.logarithmic = self.low > 0 and self.high / self.low > 30
        self.start, self.end = start, end

    def __call__(self, value: float) -> float:
        """The place of a value."""
        low, high, at = self.low, self.high, value
        if self.logarithmic:
            low, high, at = math.log(low), math.log(high), math.log(max(value, self.low))
        share = (at - low) / (high - low) if high > low else 0.5
        return self.start + share * (self.end - self.start)


def picture(name: str, parts: Iterable[Markup], height: float, kind: str = "chart") -> Markup:
    """A picture with an accessible name.

    Examples:
        >>> str(picture("a < b", [], 10))
        '<svg class="chart" viewBox="0 0 360 10" role="img" aria-label="a &lt; b"></svg>'
    """
    return Markup('<svg class="{}" viewBox="0 0 {} {:g}" role="img" aria-label="{}">{}</svg>').format(
        kind, WIDTH, height, name, Markup("").join(parts)
    )


def strip(name: str, parts: Sequence[tuple[float, str]], *, thin: bool = False) -> Markup:
    """One bar as wide as its place, of parts with their shares and classes, one after the other."""
    found, left = [], 0.0
    for share, kind in parts:
        found.append(rectangle(left * WIDTH, 0, share * WIDTH, 10, kind))
        left += share
    return Markup(
        '<svg class="{}" viewBox="0 0 {} 10" preserveAspectRatio="none" role="img" aria-label="{}">{}</svg>'
    ).format("strip thin" if thin else "strip", WIDTH, name, Markup("").join(found))


def rectangle(x: float, y: float, width: float, height: float, kind: str) -> Markup:
    """A filled rectangle; nothing if it has no width."""
    if width <= 0:
        return Markup("")
    return Markup('<rect class="{}" x="{:.2f}" y="{:.2f}" width="{:.2f}" height="{:.2f}"/>').format(
        kind, x, y, width, height
    )


def line(x1: float, y1: float, x2: float, y2: float, kind: str) -> Markup:
    """A line between two places."""
    return Markup('<line class="{}" x1="{:.2f}" y1="{:.2f}" x2="{:.2f}" y2="{:.2f}"/>').format(kind, x1, y1, x2, y2)


def circle(x: float, y: float, radius: float, kind: str) -> Markup:
    """A dot."""
    return Markup('<circle class="{}" cx="{:.2f}" cy="{:.2f}" r="{:g}"/>').format(kind, x, y, radius)


def path(places: Sequence[tuple[float, float]], kind: str) -> Markup:
    """A curve through places, without filling."""
    return Markup('<polyline class="{}" points="{}"/>').format(kind, " ".join(f"{x:.2f},{y:.2f}" for x, y in places))


def text(x: float, y: float, words: str, kind: str = "", anchor: str = "start") -> Markup:
    """A line of text that begins, ends or has its middle at a place."""
    return Markup('<text class="{}" x="{:.2f}" y="{:.2f}" text-anchor="{}">{}</text>').format(kind, x, y, anchor, words)


def group(parts: Iterable[Markup], told: str) -> Markup:
    """Parts that tell something when a pointer rests on them."""
    return Markup("<g><title>{}</title>{}</g>").format(told, Markup("").join(parts))


def short(value: float) -> str:
    """A number in few characters.

    Examples:
        >>> short(0.01234), short(1234.0), short(3.2e-9), short(0.0)
        ('0.0123', '1.23e+03', '3.2e-09', '0')
    """
    return f"{value:.3g}"
