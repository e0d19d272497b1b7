"""How much of the library the tests run: lines and branches, room by room.

    make covered                                        # the whole suite under coverage.py, then this table
    python -m benchmarks.covered build/covered.json     # the table alone, from `coverage json`

What tests run in processes of their own (kills, hostile files, several ranks) is not counted: the true figures are a
little higher.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections import defaultdict
from pathlib import Path
from typing import Any

from linearize.report.timing import write_json
from linearize.text_table import render

HERE = Path(__file__).resolve().parent
_COUNTS = ("covered_lines", "num_statements", "covered_branches", "num_branches")


def by_room(files: dict[str, dict[str, Any]]) -> dict[str, dict[str, int]]:
    """Counts of each folder of the library; files beside the folders are "verbs".

    Examples:
        >>> one = {"summary": dict(zip(_COUNTS, (3, 4, 1, 2)))}
        >>> by_room({"linearize/graph/walk.py": one, "linearize/collapse.py": one})["verbs"]["num_statements"]
        4
    """
    rooms: dict[str, dict[str, int]] = defaultdict(lambda: dict.fromkeys(_COUNTS, 0))
    for path, found in files.items():
        parts = Path(path).parts[1:]
        room = rooms[parts[0] if len(parts) > 1 else "verbs"]
        for name in _COUNTS:
            room[name] += found["summary"][name]
    return dict(sorted(rooms.items()))


def table(rooms: dict[str, dict[str, int]]) -> str:
    """The counts as percentages, with the sum of all."""
    whole = {name: sum(room[name] for room in rooms.values()) for name in _COUNTS}
    rows = []
    for room, found in {**rooms, "all": whole}.items():
        lines, branches = (found[f"covered_{kind}"] for kind in ("lines", "branches"))
        shares = (lines / max(found["num_statements"], 1), branches / max(found["num_branches"], 1))
        rows.append((room, str(found["num_statements"]), *(f"{100 * share:.1f}%" for share in shares)))
    return render(("room", "statements", "lines", "branches"), rows)


def main() -> None:
    """Print the table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("found", type=Path, help="what `coverage json` wrote")
    parser.add_argument("--json", type=Path, default=HERE / "results" / "covered.json")
    options = parser.parse_args()
    rooms = by_room(json.loads(options.found.read_text(encoding="utf-8"))["files"])
    print(table(rooms))
    write_json(options.json, {"python": platform.python_version(), "rooms": rooms})


if __name__ == "__main__":
    main()
