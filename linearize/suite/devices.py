"""The device on which a suite runs: its clock, its counters, and what it tells of itself.

Everything else in this folder knows a device by `Device` only, so that all of it is tested without one.
"""

from __future__ import annotations

import gc
import os
import platform
import time
from collections.abc import Callable
from typing import Any, Protocol

import torch

from linearize import checks
from linearize.errors import UsageError
from linearize.report.timing import environment
from linearize.report.versions import versions
from linearize.suite.allocations import peak_of
from linearize.suite.nvml import Nvml
from linearize.suite.powercap import PowerCap, clock_mhz, throttled

__all__ = ["Accelerator", "Cuda", "Device", "Processor", "device_for"]

DeviceCall = Callable[[], Any]


class Device(Protocol):
    """What a suite asks of a device.

    Attributes:
        place: the device as torch names it.
    """

    place: torch.device

    def facts(self) -> dict[str, Any]:
        """What does not change in a run: name, driver, limits, versions."""

    def now(self) -> float:
        """Seconds on a clock that only goes forward."""

    def seconds(self, run: DeviceCall, number: int) -> float:
        """Mean seconds of a call, over a number of calls in a row."""

    def state(self) -> dict[str, Any]:
        """What changes: clocks, power, temperature, and under "slowed" why it is slower than it could be."""

    def joules(self) -> float | None:
        """A counter of energy; None where it cannot be read."""

    def peak(self, run: DeviceCall) -> int | None:
        """Bytes that a call takes at most, besides what was there before it; None where that cannot be known."""

    def tidy(self) -> None:
        """Give back memory that nobody uses."""


class Processor:
    """The CPU. Energy is that of its sockets, where the system lets it be read."""

    def __init__(self, place: torch.device | None = None) -> None:
        self.place = torch.device("cpu") if place is None else place
        self._power = PowerCap()
        self._throttled = throttled()

    def facts(self) -> dict[str, Any]:
        """Name, cores, versions."""
        own = environment(self.place, torch.get_default_dtype())
        facts = {"device": own["device"], "kind": self.place.type, "cores": os.cpu_count()}
        return {**facts, "versions": versions(), "kernel": platform.release(), "energy": self._power.told}

    def now(self) -> float:
        """The clock of the process."""
        return time.perf_counter()

    def seconds(self, run: DeviceCall, number: int) -> float:
        """By that clock, without the garbage collector."""
        enabled = gc.isenabled()
        gc.disable()
        try:
            return self._seconds(run, number)
        finally:
            if enabled:
                gc.enable()

    def _seconds(self, run: DeviceCall, number: int) -> float:
        self._wait()
        start = time.perf_counter()
        for _ in range(number):
            run()
        self._wait()
        return (time.perf_counter() - start) / number

    def _wait(self) -> None:
        pass

    def state(self) -> dict[str, Any]:
        """Clock, load, and whether a core was slowed by heat since the last call."""
        before, self._throttled = self._throttled, throttled()
        slowed = ["heat"] if before is not None and self._throttled != before else []
        return {"clock_mhz": clock_mhz(), "load": _load(), "slowed": slowed}

    def joules(self) -> float | None:
        """From the counters of the sockets."""
        return self._power.joules()

    def peak(self, run: DeviceCall) -> int | None:
        """As torch's allocator counts it."""
        return peak_of(run)

    def tidy(self) -> None:
        """Collect garbage."""
        gc.collect()


class Accelerator(Processor):
    """An accelerator that torch knows, by torch's common interface alone."""

    def _wait(self) -> None:
        torch.accelerator.synchronize(self.place)

    def state(self) -> dict[str, Any]:
        """The machine's load. Clocks and temperatures of such a device cannot be read here."""
        return {"load": _load(), "slowed": []}

    def joules(self) -> float | None:
        """None: energy cannot be read here."""
        return None

    def peak(self, run: DeviceCall) -> int | None:  # noqa: ARG002 - others use it
        """None: the peak of memory cannot be read here."""
        return None


class Cuda(Accelerator):
    """An NVIDIA GPU, timed by its own events. NVML tells the rest, if nvidia-ml-py is installed."""

    def __init__(self, place: torch.device) -> None:
        index = torch.cuda.current_device() if place.index is None else place.index
        super().__init__(torch.device("cuda", index))
        self._nvml = Nvml.of(str(getattr(torch.cuda.get_device_properties(index), "uuid", "")), index)

    def facts(self) -> dict[str, Any]:
        """Name, memory, driver, limits, versions."""
        own = torch.cuda.get_device_properties(self.place)
        facts = {"device": own.name, "kind": "cuda", "memory": own.total_memory, "cuda": torch.version.cuda}
        facts |= {"capability": f"{own.major}.{own.minor}", "cores": os.cpu_count(), "versions": versions()}
        return {**facts, "kernel": platform.release(), **self._nvml.facts()}

    def _seconds(self, run: DeviceCall, number: int) -> float:
        with torch.cuda.device(self.place):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self._wait()
            start.record()
            for _ in range(number):
                run()
            end.record()
            self._wait()
            return float(start.elapsed_time(end)) / 1e3 / number

    def state(self) -> dict[str, Any]:
        """Clocks, power, temperature, reasons of slowness."""
        return {"load": _load(), **self._nvml.state()}

    def joules(self) -> float | None:
        """From the counter of the board."""
        return self._nvml.joules()

    def peak(self, run: DeviceCall) -> int | None:
        """As torch's allocator counts it."""
        self._wait()
        torch.cuda.reset_peak_memory_stats(self.place)
        before = torch.cuda.memory_allocated(self.place)
        run()
        self._wait()
        return max(0, torch.cuda.max_memory_allocated(self.place) - before)

    def tidy(self) -> None:
        """Collect garbage, and empty the allocator's caches."""
        gc.collect()
        torch.cuda.empty_cache()


def device_for(name: str) -> Device:
    """The device of a name; "" takes an accelerator if there is one.

    Raises:
        UsageError: this machine has no such device.

    Examples:
        >>> device_for("cpu").place
        device(type='cpu')
    """
    if not name:
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        place = torch.device("cpu") if accelerator is None else accelerator
    else:
        try:
            place = checks.device("device", name)
        except UsageError as error:
            here = "cpu" + ", cuda" * torch.cuda.is_available()
            raise UsageError("device", f"found {name!r}, which this machine does not have", f"Here: {here}.") from error
    if place.type == "cpu":
        return Processor()
    return Cuda(place) if place.type == "cuda" else Accelerator(place)


def _load() -> float | None:
    """How many processes want a core."""
    try:
        return round(os.getloadavg()[0], 2)
    except (OSError, AttributeError):
        return None
