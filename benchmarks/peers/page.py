"""The tables inside docs/peers.md, between marks that name an experiment and a network; all else there is by hand."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from benchmarks.peers.tables import markdown, names_of
from benchmarks.runs import Plain

__all__ = ["PAGE", "fill"]

PAGE = Path("docs/peers.md")
_MARK = re.compile(r"(<!-- (\w+), ([\w.-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def fill(text: str, results: Sequence[Plain]) -> str:
    r"""The page with its tables from results; a mark without any result keeps what it has.

    Example:
        >>> fill("before\n<!-- images, vit -->\n<!-- end -->\nafter", [])
        'before\n<!-- images, vit -->\n<!-- end -->\nafter'
    """
    known = names_of(results)

    def table(found: re.Match[str]) -> str:
        if (found[2], found[3]) not in known:
            return found[0]
        return f"{found[1]}\n{markdown(results, found[2], found[3])}\n\n{found[4]}"

    return _MARK.sub(table, text)
