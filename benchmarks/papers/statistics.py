"""Confidence intervals and trends, in closed form."""

from __future__ import annotations

import math
from collections.abc import Sequence

__all__ = ["mean_interval", "normal_tail", "trend", "wilson"]

# Two-sided 95% points of Student's t by degrees of freedom, 1 to 30.
_STUDENT = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip
_NORMAL = 1.959964


def wilson(hits: int, total: int) -> tuple[float, float]:
    """The 95% confidence interval of a probability (Wilson, 1927).

    Example:
        >>> [round(end, 3) for end in wilson(5, 10)]
        [0.237, 0.763]
    """
    share, square = hits / total, _NORMAL**2
    middle = (share + square / (2 * total)) / (1 + square / total)
    half = _NORMAL / (1 + square / total) * math.sqrt(share * (1 - share) / total + square / (4 * total**2))
    return middle - half if hits else 0.0, middle + half if hits < total else 1.0  # exact, whatever the rounding


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half the width of its 95% confidence interval (Student's t; 0 for a single value).

    Example:
        >>> [round(number, 3) for number in mean_interval([1.0, 2.0, 3.0])]
        [2.0, 2.484]
    """
    count = len(values)
    mean = math.fsum(values) / count
    if count < 2:
        return mean, 0.0
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1))
    return mean, _STUDENT[min(count - 1, len(_STUDENT)) - 1] * deviation / math.sqrt(count)


def trend(places: Sequence[float], hits: Sequence[int], totals: Sequence[int]) -> float:
    """Cochran and Armitage's z: standard normal if the probability is the same at all places, positive if it rises.

    Example:
        >>> trend([1, 2, 3], [0, 5, 10], [10, 10, 10]) > 4, trend([1, 2], [5, 5], [10, 10])
        (True, 0.0)
    """
    total, share = sum(totals), sum(hits) / sum(totals)
    mean = sum(x * n for x, n in zip(places, totals, strict=True)) / total
    above = sum((x - mean) * h for x, h in zip(places, hits, strict=True))
    spread = share * (1 - share) * sum(n * (x - mean) ** 2 for x, n in zip(places, totals, strict=True))
    return above / math.sqrt(spread) if spread > 0 else 0.0


def normal_tail(z: float) -> float:
    """Probability that a standard normal number is above z.

    Example:
        >>> round(normal_tail(1.96), 3)
        0.025
    """
    return math.erfc(z / math.sqrt(2)) / 2
