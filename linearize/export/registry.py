"""All formats, by name."""

from __future__ import annotations

from linearize.export.decilm import DeciLm
from linearize.export.face import Format
from linearize.export.gguf import Gguf
from linearize.export.onnx import Onnx
from linearize.export.openvino import OpenVino
from linearize.export.pt2 import Pt2
from linearize.export.remote import Remote
from linearize.export.stock import Stock

__all__ = ["FORMATS", "format_of"]

_ALL: tuple[Format, ...] = (Onnx(), Stock(), OpenVino(), Gguf(), Remote(), Pt2(), DeciLm())
FORMATS: dict[str, Format] = {made.name: made for made in _ALL}


def format_of(name: str) -> Format:
    """A format by its name.

    Raises:
        UsageError: there is none of this name.

    Examples:
        >>> format_of("onnx").suffix
        '.onnx'
    """
    from linearize import checks

    return FORMATS[checks.choice("format", name, tuple(FORMATS))]
