"""The version. It is alone in a file so that packaging tools can read it without importing torch."""

from __future__ import annotations

__version__ = "0.2.0"
