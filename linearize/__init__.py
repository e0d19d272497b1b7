"""Find the channels whose nonlinearity a trained network no longer needs, and remove them exactly."""

from __future__ import annotations

from linearize._version import __version__ as __version__
from linearize.errors import LinearizeError

__all__ = [
    "LinearizeError",
]
