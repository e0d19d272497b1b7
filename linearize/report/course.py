"""How gates came to a budget during training: cost and loss at each decision, and what became of each site."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["Course", "SiteMoves"]

_SHOWN = 5  # sites that changed most, in what is printed


@dataclass(frozen=True)
class SiteMoves:
    """What became of a site: its channels, those that were left at the start and at the end, who went and returned."""

    channels: int
    start: int
    end: int
    went: int
    back: int


@dataclass(frozen=True)
class Course:
    """The course of a compression by gates.

    Attributes:
        points: a record for each decision: "step" of training, "asked" (share of the cost that could be left), "share"
            (what is left by the table of prices), "went" and "back" (channels since the decision before), and "loss"
            (mean of the training loss since then, without the penalty).
        sites: by name, those whose channels could move.
    """

    points: tuple[Mapping[str, float], ...]
    sites: Mapping[str, SiteMoves]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        sites = {name: asdict(moves) for name, moves in self.sites.items()}
        return {"points": [dict(point) for point in self.points], "sites": sites}

    def lines(self) -> list[str]:
        """Text: how much moved in all, and the sites that changed most."""
        went, back = (int(sum(point[name] for point in self.points)) for name in ("went", "back"))
        found = [f"{len(self.points)} decisions in training: {went} channels went, {back} of them came back"]
        most = sorted(self.sites.items(), key=lambda item: -abs(item[1].start - item[1].end))
        changed = [(name, moves) for name, moves in most if moves.start != moves.end or moves.went or moves.back]
        found += [
            f"  {name}: {moves.start} -> {moves.end} of {moves.channels} channels left, {moves.went} went, "
            f"{moves.back} came back"
            for name, moves in changed[:_SHOWN]
        ]
        return [*found, f"  ... and {len(changed) - _SHOWN} more (report.course)"] if len(changed) > _SHOWN else found
