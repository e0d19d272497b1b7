"""One line of the sweep's table."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Literal

EQUAL, NOTHING = "equal", "nothing to gate"
UNREACHED = "nothing to gate: no activation can be reached"
FINE = {EQUAL, NOTHING, UNREACHED}
META, COUNTED, RUNS_NOT = "inspected on the meta device", "counted", "does not run"


@dataclass
class Row:
    """The outcome for one model; one line of the CSV.

    Attributes:
        name, family: of the model.
        smallest: whether it stands for its family: checked at full depth.
        result: "equal", "nothing to gate", or the reason why neither.
        note: what was different: float32 inside, or the model of the same signature that was checked.
        size: of the input, and which options reduce the model.
        signature: of its modules and their settings.
        activations, gates_aside: channel activations found, and gates of other tensors, which are not counted.
        gated, collapsible: of the activations, how many got a gate; of those, how many collapse exactly.
        control: how far the linear channels moved the output (relative): the negative control.
        error: largest relative difference between gated and collapsed.
        reload: the same between collapsed and loaded.
    """

    name: str
    family: str
    smallest: bool = False
    result: str = "not run"
    note: str = ""
    size: str = ""
    signature: str = ""
    when: Literal["always", "cheaper", ""] = ""
    dtype: str = ""
    activations: int = 0
    gates_aside: int = 0
    gated: int = 0
    collapsible: int = 0
    control: float = float("nan")
    error: float = float("nan")
    reload: float = float("nan")
    parameters: int = 0
    parameters_after: int = 0
    flops: int = 0
    flops_after: int = 0
    seconds_forward: float = 0.0
    seconds_export: float = 0.0
    seconds_convert: float = 0.0
    seconds_collapse: float = 0.0
    reasons: dict[str, int] = field(default_factory=dict)

    @classmethod
    def names(cls) -> list[str]:
        """Columns of the CSV."""
        return [f.name for f in fields(cls)]
