"""Pages as one file each: no script, nothing from elsewhere, every text escaped."""

from __future__ import annotations

import base64
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from linearize.report.svg import short

__all__ = ["data_url", "page"]

_TEMPLATES = Path(__file__).parent / "templates"


def page(template: str, **values: Any) -> str:
    """A page from a template of this folder. Texts are escaped, except those that are marked as markup."""
    return _environment().get_template(template).render(**values)


def data_url(text: str, kind: str = "application/json") -> str:
    """A text as an address that holds all of it.

    Examples:
        >>> data_url("{}")
        'data:application/json;base64,e30='
    """
    return f"data:{kind};base64,{base64.b64encode(text.encode()).decode()}"


@cache
def _environment() -> Environment:
    made = Environment(
        loader=FileSystemLoader(_TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=False
    )
    made.filters["short"] = short
    return made
