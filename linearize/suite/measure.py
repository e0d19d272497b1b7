"""One cell: warm up until nothing changes any more, measure in turns, then energy and memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from linearize.report.timing import quartiles
from linearize.suite.devices import Device
from linearize.suite.matrix import Suite

__all__ = ["CellCalls", "Measured", "energy", "in_turns"]

Key = tuple[str, str]
CellCalls = Mapping[Key, Callable[[], Any]]

_SHORTEST = 0.02  # seconds: a shorter measurement is at the mercy of the clock, so fast calls repeat
_AGREE = 3  # measurements that must agree
_MOST = 100_000  # calls in one measurement


@dataclass
class Measured:
    """What came of a cell.

    Attributes:
        samples: seconds per call, a value for each round, by the model's name and that of the call.
        steady: whether the warm-up ended because times agreed.
        warmup: measurements of each call before those that count.
        states: what the device told, before the first round and after each.
    """

    samples: dict[Key, list[float]] = field(default_factory=dict)
    steady: bool = False
    warmup: int = 0
    states: list[dict[str, Any]] = field(default_factory=list)

    def watched(self) -> dict[str, Any]:
        """Clocks, power and temperature over the cell, each as least, median and most; all reasons of slowness."""
        found: dict[str, Any] = {}
        names = dict.fromkeys(name for state in self.states for name in state if name != "slowed")
        for name in names:
            values = [state[name] for state in self.states if state.get(name) is not None]
            found[name] = [min(values), quartiles(values)[1], max(values)] if values else None
        slowed = dict.fromkeys(reason for state in self.states for reason in state.get("slowed", ()))
        return {**found, "slowed": list(slowed)}


def in_turns(calls: CellCalls, device: Device, suite: Suite) -> Measured:
    """Measure each call once in a round; the order alternates.

    Args:
        calls: by the model's name and that of the call.
        device: with the clock.
        suite: rounds, and when the warm-up ends.
    """
    found = Measured()
    numbers = {name: _number(run, device) for name, run in calls.items()}
    _warm(calls, numbers, device, suite, found)
    device.state()  # what slowed it until now is no matter
    found.states.append(device.state())
    names = list(calls)
    found.samples = {name: [] for name in names}
    for position in range(suite.rounds):
        for name in names if position % 2 == 0 else names[::-1]:
            found.samples[name].append(device.seconds(calls[name], numbers[name]))
        found.states.append(device.state())
    return found


def _number(run: Callable[[], Any], device: Device) -> int:
    """How many calls make one measurement; the first call is not counted: it does what is done once."""
    device.seconds(run, 1)
    return max(1, min(_MOST, round(_SHORTEST / max(device.seconds(run, 1), 1e-9))))


def _warm(calls: CellCalls, numbers: Mapping[Key, int], device: Device, suite: Suite, found: Measured) -> None:
    """Measure until the last times of every call agree, or the time is over."""
    start = device.now()
    last: dict[Key, list[float]] = {name: [] for name in calls}
    while not found.steady and device.now() - start < suite.warmup_seconds:
        for name, run in calls.items():
            last[name] = [*last[name][1 - _AGREE :], device.seconds(run, numbers[name])]
        found.warmup += 1
        found.steady = all(
            len(times) == _AGREE and max(times) <= min(times) * (1 + suite.steady) for times in last.values()
        )


def energy(run: Callable[[], Any], seconds: float, device: Device, least: float) -> float | None:
    """Joules of a call, over as many calls as take some time; None where no counter can be read.

    Args:
        run: the call.
        seconds: how long it takes.
        device: with the counter.
        least: seconds to measure over; counters are coarse. 0 reads nothing.
    """
    if not least or device.joules() is None:
        return None
    count = max(1, min(_MOST, round(least / max(seconds, 1e-9))))
    device.seconds(run, 1)
    before = device.joules()
    device.seconds(run, count)
    after = device.joules()
    return None if before is None or after is None else (after - before) / count
