"""The coverage sweep: is every model the same function after every step?

Run: python -m benchmarks.coverage timm [NAME ...] [--families] [--workers 2] [--out FILE]

Every model is captured, gated, half linearised at random, collapsed, saved and loaded, and its function compared at
each step (`check.py`). Interrupted sweeps go on where they stopped.
"""

from __future__ import annotations

import argparse
import os
import warnings
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.coverage.pool import Limits, sweep

FOLDER = Path(__file__).parent / "results"


def timm_row(name: str, family: str, megabytes: float) -> dict[str, Any]:
    """The row of one timm model."""
    from benchmarks.coverage.cases import timm_model
    from benchmarks.coverage.check import Row, check, inspect_only, stir

    row = Row(name, family)
    model, inputs, row.size = timm_model(name, megabytes)
    if next(model.parameters()).is_meta:
        return asdict(inspect_only(row, model, inputs))
    return asdict(check(row, stir(model), inputs))


def smallest_of_each_family(pairs: list[tuple[str, str]]) -> list[str]:
    """The model with the fewest parameters of every family, built on the meta device to count them."""
    import timm
    import torch

    best: dict[str, tuple[int, str]] = {}
    for name, family in pairs:
        with torch.device("meta"):
            model = timm.create_model(name)
        size = sum(parameter.numel() for parameter in model.parameters())
        best[family] = min(best.get(family, (size, name)), (size, name))
    return [name for _, name in best.values()]


def main() -> None:
    """Parse the command line, run the sweep, print the totals."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("zoo", choices=["timm"])
    parser.add_argument("names", nargs="*", help="models; default: all")
    parser.add_argument("--families", action="store_true", help="only the smallest model of each family")
    parser.add_argument("--out", type=Path, help="CSV file; default: results/ZOO.csv beside this program")
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) // 1))
    parser.add_argument("--memory", type=float, default=8, help="GiB per process")
    parser.add_argument("--time", type=int, default=180, help="seconds per model")
    parser.add_argument("--weights", type=float, default=1500, help="MB of float64 weights above which meta is used")
    options = parser.parse_args()

    warnings.filterwarnings("ignore")
    import torch

    from benchmarks.coverage.cases import timm_names
    from benchmarks.coverage.check import Row

    torch.set_num_threads(1)
    pairs = timm_names()
    family = dict(pairs)
    names = options.names or (smallest_of_each_family(pairs) if options.families else [name for name, _ in pairs])
    out = options.out or FOLDER / f"{options.zoo}.csv"
    out.parent.mkdir(parents=True, exist_ok=True)
    rows = sweep(
        names,
        lambda name: timm_row(name, family.get(name, "?"), options.weights),
        out,
        fields=Row.names(),
        workers=options.workers,
        limits=Limits(options.time, options.memory),
    )
    for result, count in Counter(row["result"] for row in rows).most_common():
        print(f"{count:5d}  {result}")


if __name__ == "__main__":
    main()
