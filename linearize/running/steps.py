"""The steps of a long job: each is announced and timed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

__all__ = ["Steps"]


class Steps:
    """Announces and times the steps.

    Args:
        progress: False is silent, True shows bars on a terminal; a function also gets a line for each step.

    Examples:
        >>> lines = []
        >>> steps = Steps(progress=lines.append)
        >>> with steps("convert"):
        ...     pass
        >>> lines, list(steps.seconds)
        (['convert'], ['convert'])
    """

    def __init__(self, *, progress: bool | Callable[[str], None]) -> None:
        self.bars = progress is not False
        self.say: Callable[[str], None] = progress if callable(progress) else lambda _: None
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """A context that is the step of that name."""
        self.say(name)
        start = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - start

    def epoch(self, record: Mapping[str, float]) -> None:
        """Announce an epoch."""
        parts = [f"epoch {record['epoch']:.0f}", f"loss {record['loss']:.4f}", f"linear {record['share']:.1%}"]
        self.say("  " + ", ".join(parts + [f"{n} {record[n]:.4f}" for n in ("accuracy", "score") if n in record]))
