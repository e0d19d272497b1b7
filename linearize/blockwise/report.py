"""What compressing block by block came to."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from linearize.blockwise.work import FinishedBlock
from linearize.report.timing import write_json
from linearize.text_table import render

__all__ = ["BlockReport"]

_SHOWN = 12  # blocks in what is printed


@dataclass(frozen=True)
class BlockReport:
    """The result in numbers. It prints as a table.

    Attributes:
        engine: "blockwise", or "whole" if the model was compressed as a whole.
        reason: why as a whole; "" otherwise.
        measure, asked, reached: the budget, as fractions of the original's cost.
        met: whether it is met.
        parameters: of the whole model, before and after.
        blocks: what became of each block.
        sensitivity: how the loss of an option was told.
        seconds: how long each step took.
        notes: further remarks.
    """

    engine: str
    reason: str
    measure: str
    asked: float
    reached: float
    met: bool
    parameters: tuple[int, int]
    blocks: tuple[FinishedBlock, ...] = ()
    sensitivity: str = ""
    seconds: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def drift(self) -> float | None:
        """Relative squared distance of the hidden states behind the last block from those of the original model."""
        return self.blocks[-1].drift if self.blocks else None

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        blocks = [{name: value for name, value in asdict(note).items() if name != "plan"} for note in self.blocks]
        return {**asdict(self), "blocks": blocks, "drift": self.drift}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write `to_dict` as JSON.

        Raises:
            UsageError: the file cannot be written.
        """
        write_json(path, self.to_dict())

    def __str__(self) -> str:
        before, after = self.parameters
        name = {"params": "parameters", "flops": "FLOPs"}.get(self.measure, self.measure)
        lines = [
            f"engine: {self.engine}" + (f", because {self.reason}" if self.reason else ""),
            f"parameters: {before} -> {after} ({after / max(1, before):.3f})",
            f"{name} at {self.asked:.3g} of the original's asked, {self.reached:.3g} reached"
            + ("" if self.met else ": NOT MET"),
        ]
        if self.blocks:
            shown = self.blocks[:_SHOWN]
            rows = [[n.path, n.before, n.after, f"{n.error:.3g}", f"{n.drift:.3g}", f"{n.seconds:.1f}"] for n in shown]
            lines.append(render(["block", "parameters", "after", "error", "drift", "seconds"], rows))
        if len(self.blocks) > _SHOWN:
            lines.append(f"... and {len(self.blocks) - _SHOWN} more blocks, to a drift of {self.drift:.3g}")
        if self.sensitivity:
            lines.append(f"sensitivity: {self.sensitivity}")
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])
