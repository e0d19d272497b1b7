"""A table of latency ratios, stored in a file."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from linearize import schema
from linearize.errors import LinearizeError
from linearize.storage import atomic

__all__ = ["LatencyTable", "cache_file"]

_LARGEST_FILE = 2**26  # bytes


def cache_file() -> Path:
    """The file of ratios: `$LINEARIZE_CACHE`, or one in the user's cache folder."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("LINEARIZE_CACHE") or Path(home) / "linearize") / "latency.json"


@dataclass
class LatencyTable:
    """Ratios of latencies, by a key that names everything they depend on.

    Attributes:
        path: the file; None remembers nothing beyond this object.
        entries: what is known.
    """

    path: Path | None = None
    entries: dict[str, float] = field(default_factory=dict)

    @classmethod
    def open(cls, path: Path | None) -> LatencyTable:
        """Read the table in a file, without invalid entries. It is empty if there is no readable file."""
        try:
            data = schema.parse(atomic.read_file(path, limit=_LARGEST_FILE)) if path is not None else {}
        except (LinearizeError, ValueError):
            data = {}
        entries = data.items() if isinstance(data, dict) else ()
        return cls(path, {key: float(value) for key, value in entries if len(key) <= 200 and _is_ratio(value)})

    def save(self) -> None:
        """Write the table to its file, if possible. A failure is ignored, because a cache must not stop the work."""
        if self.path is None:
            return
        text = json.dumps({key: value for key, value in self.entries.items() if _is_ratio(value)})
        with suppress(OSError, LinearizeError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            atomic.write_atomically(self.path, lambda file: file.write(text.encode()))


def _is_ratio(value: Any) -> bool:
    """True for a number that a ratio of latencies can be: whatever else stands in the table is measured anew."""
    return type(value) in (int, float) and 1e-6 <= value <= 1e6
