"""What is timed: the layers of each option, as the families show them."""

from __future__ import annotations

from typing import Protocol

from linearize.families.family import Assembled, Layers
from linearize.families.option import Group, Option

__all__ = ["Shown"]


class Shown(Protocol):
    """Layers of options."""

    def layers(self, group: Group, option: Option) -> Layers:
        """The layers that an option would leave. Raises if they cannot be run separately."""

    def together(self, group: Group, layers: Layers | None) -> Assembled | None:
        """The same as one module of the group's input, or the present ones; None if they cannot be run so."""
