"""What Linux tells of a processor in files: energy counters of the sockets, clocks, and slowing by heat."""

from __future__ import annotations

import re
from pathlib import Path

__all__ = ["PowerCap", "clock_mhz", "throttled"]

_POWER = Path("/sys/class/powercap")
_CPU = Path("/sys/devices/system/cpu")


class PowerCap:
    """The energy counters of all sockets (RAPL). They are small and start again at 0, so they are read often.

    Args:
        root: where the system keeps them.
    """

    def __init__(self, root: Path = _POWER) -> None:
        found = sorted(root.glob("*-rapl:*")) if root.is_dir() else []
        self._sockets = [path for path in found if re.fullmatch(r"[a-z]+-rapl:\d+", path.name)]
        self._last: dict[Path, int] = {}
        self._total = 0
        self.told = self._why_not() or f"RAPL of {len(self._sockets)} sockets"

    def _why_not(self) -> str:
        if not self._sockets:
            return "this system has no RAPL counters"
        if any(_number(path / "energy_uj") is None for path in self._sockets):
            return "the RAPL counters can be read by root only"
        return ""

    def joules(self) -> float | None:
        """Joules since the first call; None where the counters cannot be read."""
        now = {path: _number(path / "energy_uj") for path in self._sockets}
        if not now or any(value is None for value in now.values()):
            return None
        for path, value in now.items():
            change = (value or 0) - self._last.get(path, value or 0)
            if change < 0:
                change += _number(path / "max_energy_range_uj") or 0
            self._total += max(0, change)
            self._last[path] = value or 0
        return self._total / 1e6


def clock_mhz(root: Path = _CPU, told: Path = Path("/proc/cpuinfo")) -> float | None:
    """The mean clock of the cores in MHz; None where no file has it."""
    found = [_number(path) for path in root.glob("cpu[0-9]*/cpufreq/scaling_cur_freq")]
    clocks = [value / 1e3 for value in found if value is not None]
    if not clocks and told.is_file():
        lines = told.read_text(errors="replace").splitlines()
        clocks = [float(line.partition(":")[2]) for line in lines if line.startswith("cpu MHz")]
    return round(sum(clocks) / len(clocks), 1) if clocks else None


def throttled(root: Path = _CPU) -> int | None:
    """How often cores were slowed by heat since the system started; None where no file has it."""
    found = [_number(path) for path in root.glob("cpu[0-9]*/thermal_throttle/core_throttle_count")]
    counts = [value for value in found if value is not None]
    return sum(counts) if counts else None


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None
