"""Text tables, aligned by column, for terminals, log files and documents."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

__all__ = ["render", "render_html", "render_markdown"]

_NUMERIC = set("0123456789.+-%xe, naif±[]–")


def render(headers: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table as text: columns of numbers aligned right, all others left.

    Args:
        headers: a title for each column.
        rows: cells; each is shown as `str` shows it, None as "-".

    Raises:
        ValueError: a row has not as many cells as there are headers.

    Examples:
        >>> print(render(["name", "share"], [["first", 0.5], ["second", None]]))
        name    share
        ------  -----
        first     0.5
        second      -
    """
    cells, right = _prepare(headers, rows)
    widths = [max(len(row[column]) for row in cells) for column in range(len(headers))]

    def line(row: Sequence[str]) -> str:
        padded = [
            text.rjust(width) if at_right else text.ljust(width)
            for text, width, at_right in zip(row, widths, right, strict=True)
        ]
        return "  ".join(padded).rstrip()

    rule = "  ".join("-" * width for width in widths)
    return "\n".join([line(cells[0]), rule, *(line(row) for row in cells[1:])])


def render_markdown(headers: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """The same table in Markdown.

    Examples:
        >>> print(render_markdown(["name", "share"], [["first", 0.5]]))
        | name | share |
        |:--|--:|
        | first | 0.5 |
    """
    cells, right = _prepare(headers, rows)
    rule = "|" + "|".join("--:" if at_right else ":--" for at_right in right) + "|"
    lines = ["| " + " | ".join(text.replace("|", "\\|") for text in row) + " |" for row in cells]
    return "\n".join([lines[0], rule, *lines[1:]])


def render_html(headers: Sequence[str], rows: Iterable[Sequence[object]], notes: Iterable[str] = ()) -> str:
    """The same table for a notebook: every text escaped, colours and fonts left to the notebook.

    Args:
        headers: a title for each column.
        rows: cells.
        notes: lines below the table.

    Examples:
        >>> print(render_html(["name", "share"], [["<first>", 0.5]], ["one row"]))
        <table>
        <thead><tr><th style="text-align: left">name</th><th style="text-align: right">share</th></tr></thead>
        <tbody>
        <tr><td style="text-align: left">&lt;first&gt;</td><td style="text-align: right">0.5</td></tr>
        </tbody>
        </table>
        <p>one row</p>
    """
    cells, right = _prepare(headers, rows)
    sides = ["right" if at_right else "left" for at_right in right]

    def line(row: Sequence[str], tag: str) -> str:
        inner = (
            f'<{tag} style="text-align: {side}">{escape(text)}</{tag}>' for text, side in zip(row, sides, strict=True)
        )
        return f"<tr>{''.join(inner)}</tr>"

    body = [line(row, "td") for row in cells[1:]]
    below = [f"<p>{escape(note)}</p>" for note in notes]
    head = f"<thead>{line(cells[0], 'th')}</thead>"
    return "\n".join(["<table>", head, "<tbody>", *body, "</tbody>", "</table>", *below])


def _prepare(headers: Sequence[str], rows: Iterable[Sequence[object]]) -> tuple[list[list[str]], list[bool]]:
    """All cells as text, headers first, and for each column whether it holds numbers."""
    body = [["-" if cell is None else str(cell) for cell in row] for row in rows]
    for row in body:
        if len(row) != len(headers):
            raise ValueError(f"a row of {len(row)} cells in a table of {len(headers)} columns: {row}")
    right = [all(_is_number(row[column]) for row in body) for column in range(len(headers))]
    return [list(headers), *body], right


def _is_number(text: str) -> bool:
    return set(text.lower()) <= _NUMERIC and (text == "-" or any(c.isdigit() for c in text) or text in {"nan", "inf"})
