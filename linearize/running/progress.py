"""A progress bar, shown only on a terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from html import escape
from typing import Any

__all__ = ["progress_bar"]

_PACE = 0.1  # seconds between two pictures in a notebook: each is a message to a browser


@contextmanager
def progress_bar(label: str, total: int | None, *, enabled: bool = True) -> Iterator[Callable[[str], None]]:
    """A progress bar on standard error or in a notebook. The function that it gives moves it and shows a note.

    Shown only if `enabled`, and if standard error is a terminal or the program runs in a notebook.

    Examples:
        >>> with progress_bar("counting", total=2) as advance:
        ...     advance("one")
        ...     advance("two")
    """
    if enabled and _in_notebook():
        with _in_cell(label, total) as advance:
            yield advance
        return
    if not (enabled and sys.stderr.isatty()):
        yield lambda _: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(label, total=total, note="")
        yield lambda note: bar.update(task, advance=1, note=note)


def _in_notebook() -> bool:
    """Whether this is a kernel behind a notebook; a terminal with IPython is a terminal."""
    shell = sys.modules.get("IPython")
    found: Any = shell.get_ipython() if shell is not None and hasattr(shell, "get_ipython") else None
    return getattr(found, "kernel", None) is not None


@contextmanager
def _in_cell(label: str, total: int | None) -> Iterator[Callable[[str], None]]:
    """A bar of the browser's own in the cell's output, gone at the end; it needs no widgets."""
    from IPython.display import HTML, display

    done, shown, begun = 0, 0.0, time.monotonic()
    handle: Any = display(HTML(_picture(label, 0, total, "")), display_id=True)

    def advance(note: str) -> None:
        nonlocal done, shown
        done += 1
        now = time.monotonic()
        if now - shown < _PACE and done != total:
            return
        shown = now
        left = f", {(now - begun) / done * (total - done):.0f} s left" if total and done < total else ""
        handle.update(HTML(_picture(label, done, total, f"{note}{left}")))

    try:
        yield advance
    finally:
        handle.update(HTML(""))


def _picture(label: str, done: int, total: int | None, note: str) -> str:
    """The bar as HTML.

    Examples:
        >>> _picture("a<b", 1, 2, "")
        '<label>a&lt;b <progress value="1" max="2"></progress> 1 of 2 </label>'
    """
    size = f' value="{done}" max="{total}"' if total else ""
    count = f"{done} of {total}" if total else str(done)
    return f"<label>{escape(label)} <progress{size}></progress> {count} {escape(note)}</label>"
