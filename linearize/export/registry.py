"""All formats, by name."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from linearize.export.face import Format

    FORMATS: dict[str, Format]

__all__ = ["FORMATS", "format_of"]


@cache
def _formats() -> dict[str, Format]:
    """The formats themselves. Their modules are imported when one is first asked for: most programs never do."""
    from linearize.export.decilm import DeciLm
    from linearize.export.gguf import Gguf
    from linearize.export.onnx import Onnx
    from linearize.export.openvino import OpenVino
    from linearize.export.pt2 import Pt2
    from linearize.export.pte import Pte
    from linearize.export.remote import Remote
    from linearize.export.stock import Stock

    made: tuple[Format, ...] = (Onnx(), Stock(), OpenVino(), Gguf(), Remote(), Pt2(), Pte(), DeciLm())
    return {one.name: one for one in made}


def __getattr__(name: str) -> Any:
    if name == "FORMATS":
        return _formats()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def format_of(name: str) -> Format:
    """A format by its name.

    Raises:
        UsageError: there is none of this name.

    Examples:
        >>> format_of("onnx").suffix
        '.onnx'
    """
    from linearize import checks

    return _formats()[checks.choice("format", name, tuple(_formats()))]
