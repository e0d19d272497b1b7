"""A plan that the search has tried."""

from __future__ import annotations

import math
from dataclasses import dataclass

from linearize.checks import is_number

__all__ = ["Trial"]


@dataclass(frozen=True)
class Trial:
    """A plan that was carried out and measured, in the search for a better one.

    Attributes:
        name: which plan it was, such as "at the start" or "in trial 3".
        loss: the distance of its outputs to the original's on some batches; None if it was given up half-way, since
            it had fallen behind.
        wins: whether it was the best so far.
    """

    name: str
    loss: float | None
    wins: bool

    def checked(self) -> Trial:
        """Check values that were read from a file, and give them back.

        Raises:
            TypeError: one is of another kind.
        """
        fits = self.loss is None or (is_number(self.loss) and math.isfinite(self.loss))
        if not isinstance(self.name, str) or not isinstance(self.wins, bool) or not fits:
            raise TypeError("no trial")
        return self
