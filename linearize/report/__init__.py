"""Results as text tables and pictures."""

from __future__ import annotations
