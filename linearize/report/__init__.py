"""How results are shown: text tables and pictures."""

from __future__ import annotations
