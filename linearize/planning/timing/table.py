"""Ratios of latencies, remembered in a file."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path


def cache_file() -> Path:
    """Where ratios are remembered: `$LINEARIZE_CACHE`, or the user's cache folder."""
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
        """The table in a file; an empty one if there is none that can be read."""
        try:
            text = path.read_text(encoding="utf-8") if path is not None else "{}"
            entries = {str(key): float(value) for key, value in json.loads(text).items()}
        except (OSError, ValueError, TypeError, AttributeError):
            entries = {}
        return cls(path, entries)

    def save(self) -> None:
        """Write the table, if it has a file and that can be written: a cache must not stop anybody's work."""
        if self.path is None:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            beside = self.path.with_name(f".{self.path.name}.{os.getpid()}")
            beside.write_text(json.dumps(self.entries), encoding="utf-8")
            beside.replace(self.path)
        except OSError:
            return
