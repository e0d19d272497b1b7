"""The most memory that torch's allocator on the CPU had given out during a call."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

__all__ = ["peak_of"]


def peak_of(run: Callable[[], Any]) -> int | None:
    """Bytes of a call at most, as the profiler saw them given out and taken back; None if it did not see any.

    Memory of other libraries than torch is not seen.

    Examples:
        >>> peak_of(lambda: torch.empty(1000, dtype=torch.float64).sum()) >= 8000
        True
    """
    cpu = torch.profiler.ProfilerActivity.CPU
    with _silent(), torch.profiler.profile(activities=[cpu], profile_memory=True) as profile:
        kept = run()
    del kept
    results: Any = getattr(profile.profiler, "kineto_results", None)
    if results is None:
        return None
    changes = [(e.start_ns(), e.nbytes()) for e in results.events() if e.name() == "[memory]"]
    total = most = 0
    for _, size in sorted(changes, key=lambda change: change[0]):
        total += size
        most = max(most, total)
    return most or None


@contextmanager
def _silent() -> Iterator[None]:
    """The profiler tells on standard error when it starts, unless its user has said something about it."""
    name = "KINETO_LOG_LEVEL"
    if name in os.environ:
        yield
        return
    os.environ[name] = "99"
    try:
        yield
    finally:
        del os.environ[name]
