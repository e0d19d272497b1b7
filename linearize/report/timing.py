"""Measured latencies as data: medians and quartiles in seconds, ratios, and the machine they were measured on."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from linearize.errors import CheckpointError, UsageError
from linearize.storage.folders import write_text
from linearize.text_table import render

__all__ = ["BenchmarkResult", "Ratio", "Timing", "environment", "quartiles", "write_json", "write_result"]


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """First quartile, median and third quartile, interpolated.

    Examples:
        >>> quartiles([1.0, 2.0, 3.0, 4.0, 5.0])
        (2.0, 3.0, 4.0)
    """
    low, middle, high = torch.tensor(values, dtype=torch.float64).quantile(
        torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
    )
    return float(low), float(middle), float(high)


@dataclass(frozen=True)
class Timing:
    """Latency of one model at one batch size, in seconds per forward pass."""

    model: str
    batch_size: int
    compiled: bool
    median: float
    q1: float
    q3: float
    samples: tuple[float, ...] = field(repr=False, default=())

    @classmethod
    def of(cls, model: str, batch_size: int, samples: Sequence[float], *, compiled: bool) -> Timing:
        """The summary of single measurements."""
        q1, median, q3 = quartiles(samples)
        return cls(model, batch_size, compiled, median, q1, q3, tuple(samples))


@dataclass(frozen=True)
class Ratio:
    """Latency of a model over that of the reference, round by round: below 1 is faster."""

    model: str
    reference: str
    batch_size: int
    compiled: bool
    median: float
    q1: float
    q3: float

    @classmethod
    def of(cls, model: str, reference: str, batch_size: int, values: Sequence[float], *, compiled: bool) -> Ratio:
        """The summary of the ratios of all rounds."""
        q1, median, q3 = quartiles(values)
        return cls(model, reference, batch_size, compiled, median, q1, q3)

    def __str__(self) -> str:
        return f"{self.median:.2f} [{self.q1:.2f}, {self.q3:.2f}]"


@dataclass(frozen=True)
class BenchmarkResult:
    """The result of `benchmark`. It prints as a table.

    Attributes:
        timings: one per model, batch size and way of running (eager or compiled), in seconds.
        ratios: the latency of each other model divided by that of the first.
        environment: device, threads, dtype, versions, rounds.
    """

    timings: tuple[Timing, ...]
    ratios: tuple[Ratio, ...]
    environment: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Plain data; times in seconds."""
        return {
            "unit": "seconds",
            "environment": dict(self.environment),
            "timings": [asdict(timing) for timing in self.timings],
            "ratios": [asdict(ratio) for ratio in self.ratios],
        }

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write `to_dict` as JSON.

        Raises:
            UsageError: the file cannot be written.
        """
        write_json(path, self.to_dict())

    def __str__(self) -> str:
        by_key = {(r.model, r.batch_size, r.compiled): r for r in self.ratios}
        rows = []
        for t in self.timings:
            ratio = by_key.get((t.model, t.batch_size, t.compiled))
            spread = f"[{t.q1:.3g}, {t.q3:.3g}]"
            rows.append([t.model, t.batch_size, "yes" if t.compiled else "no", f"{t.median:.3g}", spread, ratio])
        facts = self.environment
        where = facts.get("runtime") or f"torch {facts['torch']}"
        title = f"{facts['device']}, {facts['threads']} threads, {facts['dtype']}, {where}"
        headers = ["model", "batch", "compiled", "median s", "quartiles s", "ratio [quartiles]"]
        return f"{title}\n{render(headers, rows)}"


def environment(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """The facts that one needs to judge a latency."""
    on_cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if on_cuda else (_processor() or device.type),
        "device_type": device.type,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "dtype": str(dtype).removeprefix("torch."),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.system(),
    }


def _processor() -> str:
    """The processor's name; Linux tells it in a file only."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def write_json(path: str | os.PathLike[str], data: Any) -> None:
    """Write plain data as JSON, completely or not at all.

    Raises:
        UsageError: the file cannot be written.
    """
    write_result(path, json.dumps(data, indent=1, allow_nan=False) + "\n")


def write_result(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file for a user, completely or not at all.

    Raises:
        UsageError: the file cannot be written.
    """
    try:
        write_text(Path(path), text)
    except CheckpointError as error:
        found = f"cannot be written ({error.found.removeprefix('it cannot be written: ')})"
        raise UsageError(str(path), found, "Pass a file in a folder that exists.") from error
