"""Results of several machines side by side, as rows, as CSV and as a page."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from linearize.errors import UsageError
from linearize.suite.matrix import suite_of
from linearize.suite.results import identity_of, records_of

__all__ = ["Machine", "machines_of", "to_csv"]

COLUMNS = (
    "machine work way dtype batch shape length new_tokens threads model seconds seconds_q1 seconds_q3 ratio ratio_q1 "
    "ratio_q3 per_second first_token first_token_ratio tokens_per_second peak_bytes joules steady slowed left_out "
    "driver power_limit_w clock_mhz torch time"
).split()


@dataclass(frozen=True)
class Machine:
    """What one machine has measured.

    Attributes:
        name: of its device; with the folder's name where two machines have the same one.
        folder: where the results are.
        models: class and number of parameters of each model, the original first.
        records: a result for each cell that was measured.
        missing: number of cells that were not.
    """

    name: str
    folder: Path
    models: dict[str, Any]
    records: list[dict[str, Any]]
    missing: int

    @property
    def facts(self) -> dict[str, Any]:
        """The environment of the last cell, flat."""
        last = self.records[-1]["environment"]
        known = {name: value for name, value in last.items() if name != "versions" and value is not None}
        return {**known, **last.get("versions", {})}


def machines_of(folders: Sequence[Path]) -> list[Machine]:
    """Read the results of folders; the original stands before what is compared with it.

    Raises:
        UsageError: a folder holds no results, is damaged, or is given twice.
    """
    if not folders:
        raise UsageError("DIR", "found none", "Pass the folders that linearize bench --suite has written.")
    twice = [str(folder) for folder, count in Counter(folder.resolve() for folder in folders).items() if count > 1]
    if twice:
        raise UsageError("DIR", f"found {twice[0]} twice", "Pass each folder once.")
    known = [(folder, identity_of(folder)) for folder in folders]
    devices = Counter(str(identity.get("device")) for _, identity in known)
    found = []
    for folder, identity in known:
        device = str(identity.get("device"))
        name = device if devices[device] == 1 else f"{device} ({folder.resolve().name})"
        records = [record for record in records_of(folder) if record["models"]]
        if not records:
            raise UsageError(str(folder), "holds no results yet", "Run its suite first, or leave it out.")
        cells = len(suite_of(identity.get("suite"), str(folder)).cells())
        found.append(Machine(name, folder, identity.get("models", {}), records, max(0, cells - len(records))))
    return found


def flat_rows(machine: Machine) -> list[dict[str, Any]]:
    """A flat row for each model in each cell."""
    rows = []
    for record in machine.records:
        told, watched = record["environment"], record.get("watched", {})
        around = {"machine": machine.name, **record["cell"], "steady": record.get("steady"), "time": record.get("time")}
        around |= {"driver": told.get("driver"), "power_limit_w": told.get("power_limit_w")}
        around |= {"clock_mhz": (watched.get("clock_mhz") or [None, None])[1]}
        around |= {"torch": told.get("versions", {}).get("torch"), "slowed": ", ".join(watched.get("slowed", ()))}
        around |= {"threads": told.get("threads")}
        for name, result in record["models"].items():
            own = {key: result.get(key) for key in ("per_second", "tokens_per_second", "peak_bytes", "joules")}
            own |= {"left_out": result.get("left_out")}
            for key in ("seconds", "ratio"):
                spread = result.get(key) or {}
                own |= {key: spread.get("median"), f"{key}_q1": spread.get("q1"), f"{key}_q3": spread.get("q3")}
            for key in ("first_token", "first_token_ratio"):
                own[key] = (result.get(key) or {}).get("median")
            rows.append({**around, "model": name, **own})
    return rows


def to_csv(machines: Sequence[Machine]) -> str:
    """All rows as CSV; times in seconds, memory in bytes, energy in joules per call."""
    made = io.StringIO()
    writer = csv.DictWriter(made, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for machine in machines:
        for row in flat_rows(machine):
            writer.writerow({name: _safe(row.get(name)) for name in COLUMNS})
    return made.getvalue()


def _safe(value: Any) -> Any:
    """A text that no spreadsheet takes for a formula."""
    return f"'{value}" if isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t", "\r") else value
