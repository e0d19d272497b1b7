"""docs/coverage.md from the tables of the sweeps."""

from __future__ import annotations

import ast
import json
import math
from collections import Counter
from pathlib import Path
from statistics import median

from benchmarks.coverage.pool import Record, read_records
from benchmarks.coverage.row import EQUAL, FINE, META, NOTHING, RUNS_NOT, UNREACHED
from benchmarks.coverage.tables import (
    OTHER,
    Totals,
    by_family,
    convert_ratios,
    reasons,
    share,
    smallest_of,
    table,
    totals,
    verdict,
)

PAGE = Path(__file__).parents[2] / "docs" / "coverage.md"
ZOOS = ("timm", "transformers")

_HEAD = """# Coverage

This page answers: does it work on my model? Every model of timm and every model type of transformers goes through the
same test, with random weights:

1. The model is captured, and every activation gets a gate.
2. A random half of the channels of every gate is made linear, with random lines.
3. The model is collapsed, saved and loaded.

*Equal* means that all of these hold:

- The output of the gated model equals the original's bitwise.
- The linear channels changed the output. (This is the negative control.)
- The output of the collapsed model equals that of the gated model to 1e-12 in float64. The limit is 1e-5 if the model
  computes in single precision inside, or if it is so large that it is checked in float32.
- The output of the loaded model equals that of the collapsed model bitwise, once the file's tensors are copied into
  memory.

To save time, images are as small as a model takes them. If a timm model has more than 100 modules, it is built with
fewer layers where timm has an option for that (EfficientNets: one block a stage), except for the smallest model of each
family. Configurations of transformers are tiny, and derived from the library's own defaults. Models that are still too
large are only inspected on the meta device. Each model runs in its own process.

`make coverage` makes this page and the tables behind it, `benchmarks/coverage/results/*.csv`.
Measured with {versions}."""

_COLUMNS = """The columns count models:

- *run by themselves*: the model can be built from a configuration alone, and its forward runs;
- *equal*: as defined above;
- *no activation*: the model has no activation that could get a gate;
- *none reachable*: it has activations, but none of them can get a gate;
- *meta only*: the model is too large, and was only inspected on the meta device;
- *other*: none of these; the last section of this page gives the reason;
- *equal or nothing*: the sum of *equal*, *no activation* and *none reachable*."""

_PEER = """## Beside Torch-Pruning

The two tools have different tasks. Torch-Pruning removes channels and changes the function. Here it removes a quarter
of all channels by magnitude, except in the classifier, and the heads of attention are declared to it. linearize must
keep the function. Both got the smallest model of each timm family on the same input. Torch-Pruning had 120 seconds for
each model (240 for some of those that took longer), and linearize had up to 600, both on a loaded machine.

Torch-Pruning gave a smaller model that runs for {runs} of {families} families. linearize ended with "equal" or "nothing
to gate" for {fine} families."""

_TIME = """## Time

`convert` takes {middle:.2f} times as long as one forward pass and one capture by `torch.export` of the same model
together (median of {count} models; 5th to 95th percentile {low:.2f} to {high:.2f}; two models ran at a time)."""

_ACTIVATIONS = """## Activations

The first column counts the elementwise nonlinear activations that act on channels. Activations that only scale another
tensor (in attention, squeeze-and-excite, routers) are counted in the second column. *Collapsible* means that the linear
channels are removed exactly, by merging or by vanishing. The linear channels of the other activations keep a plain
partial activation. The tables below give the reasons."""


_KINDS = {"": OTHER, ", none reachable": UNREACHED, ", on the meta device only": META, ", not run by itself": RUNS_NOT}


def write_report(folder: Path, page: Path = PAGE) -> Path:
    """Write the page from the CSV files and `versions.json` in a folder."""
    tables = {zoo: list(read_records(folder / f"{zoo}.csv").values()) for zoo in ZOOS}
    sizes = read_records(folder / "sizes.csv")
    small = set(smallest_of(sizes.values()).values())
    for row in tables["timm"]:  # a process that was stopped could not say this much
        row |= {"family": sizes[row["name"]]["family"], "smallest": str(row["name"] in small)}
    for row in tables["transformers"]:
        row["family"] = row["family"] or row["name"]
    peer = list(read_records(folder / "torch-pruning.csv").values())
    for row in peer:
        row["family"] = sizes[row["name"]]["family"]
    versions = json.loads((folder / "versions.json").read_text())
    parts = [
        _HEAD.format(versions=", ".join(f"{name} {version}" for name, version in versions.items())),
        _totals(tables, json.loads((folder / "known.json").read_text())),
        _activations(tables),
        _time(tables["timm"] + tables["transformers"]),
        _peer(tables["timm"], peer),
        _families("timm, by family", tables["timm"], {row["family"]: row["result"] for row in peer}),
        _families("transformers, by family", [row for row in tables["transformers"] if verdict(row) != RUNS_NOT], {}),
        _rest(tables),
    ]
    page.write_text("\n\n".join(part for part in parts if part) + "\n")
    return page


def _totals(tables: dict[str, list[Record]], known: dict[str, int]) -> str:
    groups = {
        "timm, all names": tables["timm"],
        "timm, smallest of each family": [row for row in tables["timm"] if row["smallest"] == "True"],
        "transformers, model types": tables["transformers"],
    }
    heads = [
        "",
        "models",
        "run by themselves",
        EQUAL,
        "no activation",
        "none reachable",
        "meta only",
        OTHER,
        "equal or nothing",
    ]
    lines = []
    for title, rows in groups.items():
        found = totals(rows)
        counts = [found.results[key] for key in (EQUAL, NOTHING, UNREACHED, META, OTHER)]
        lines.append([title, found.models, found.runs, *counts, share(found.fine, found.runs)])
    return f"## Totals\n\n{_COLUMNS}\n\n" + table(heads, lines) + _missing(tables, known)


def _missing(tables: dict[str, list[Record]], known: dict[str, int]) -> str:
    """What an unfinished sweep says."""
    left = {zoo: known[zoo] - len(rows) for zoo, rows in tables.items() if known[zoo] > len(rows)}
    if not left:
        return ""
    counts = " and ".join(f"{count} of {known[zoo]} names of {zoo}" for zoo, count in left.items())
    return (
        f"\n\n{counts} have not been tested yet. timm's names are tested in random order, after the smallest model of\n"
        "each family; those of transformers in alphabetical order. `make coverage` continues where it stopped."
    )


def _activations(tables: dict[str, list[Record]]) -> str:
    sums = {zoo: totals(rows) for zoo, rows in tables.items()}
    heads = ["", "activations", "scale another tensor", "gated", "collapsible, of the gated"]
    parts = [_ACTIVATIONS, table(heads, [_activation_line(zoo, found) for zoo, found in sums.items()])]
    for zoo, rows in tables.items():
        parts += [f"Why not, in {zoo}:", table(["reason", "activations", "models"], reasons(rows))]
    return "\n\n".join(parts)


def _activation_line(zoo: str, found: Totals) -> list[object]:
    gated, collapsible = share(found.gated, found.activations), share(found.collapsible, found.gated)
    return [zoo, found.activations, found.aside, gated, collapsible]


def _time(rows: list[Record]) -> str:
    ratios = convert_ratios(rows)
    if not ratios:
        return ""
    edge = len(ratios) // 20
    return _TIME.format(middle=median(ratios), count=len(ratios), low=ratios[edge], high=ratios[-1 - edge])


def _peer(rows: list[Record], peer: list[Record]) -> str:
    if not peer:
        return ""
    names = {row["name"] for row in peer}
    fine = sum(row["result"] in FINE for row in rows if row["name"] in names)
    return _PEER.format(runs=sum(row["result"] == "runs" for row in peer), families=len(peer), fine=fine)


def _families(title: str, rows: list[Record], peer: dict[str, str]) -> str:
    heads = ["family", "models", EQUAL, "nothing", "rest", "activations", "gated", "collapsible", "largest error"]
    lines = []
    for family, group in by_family(rows).items():
        found = totals(group)
        line: list[object] = [family, found.models, found.results[EQUAL], found.fine - found.results[EQUAL]]
        line += [found.models - found.fine, found.activations, found.gated, found.collapsible]
        line.append("-" if math.isnan(found.error) else f"{found.error:.0e}")
        lines.append([*line, peer.get(family, "-")[:70]] if peer else line)
    return f"## {title}\n\n" + table([*heads, "Torch-Pruning"] if peer else heads, lines)


def _rest(tables: dict[str, list[Record]]) -> str:
    parts = ['## What did not end in "equal" or "nothing to gate"']
    for zoo, rows in tables.items():
        kinds = Counter(map(verdict, rows))
        for title, kind in _KINDS.items():
            if kinds[kind]:
                lines = [[row["name"], row["size"], _reason(row)] for row in rows if verdict(row) == kind]
                parts += [f"### {zoo}{title} ({kinds[kind]})", table(["model", "size", "why"], lines)]
    return "\n\n".join(parts)


def _reason(row: Record) -> str:
    if verdict(row) == META:
        return f"{int(row['parameters']) / 1e6:.0f} M parameters"
    if verdict(row) == UNREACHED:
        return "; ".join(f"{reason} ({count})" for reason, count in ast.literal_eval(row["reasons"] or "{}").items())
    return str(row["result"]).removeprefix(f"{RUNS_NOT}: ")
