"""The exception for a walk through the graph that cannot continue."""

from __future__ import annotations


class Dead(Exception):
    """A walk ended without a linear map; the argument is the reason, in words for the user."""
