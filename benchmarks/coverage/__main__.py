"""The coverage sweep: is every model the same function after every step?

Run: python -m benchmarks.coverage {timm,transformers,torch-pruning,report} [NAME ...]

Every model is captured, gated, half linearised at random, collapsed, saved and loaded, and its function compared at
each step (`check.py`). The smallest model of each timm family is checked at full depth, and a `torch.export` of it is
timed beside `convert`; deep models are checked with fewer layers where timm takes such an option. `torch-pruning`
runs that library on the smallest models, for comparison. `report` writes docs/coverage.md from all results.
Interrupted sweeps go on where they stopped; --again repeats what was not "equal".
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import linearize
from benchmarks.coverage.pool import Limits, Record, read_records, sweep
from benchmarks.coverage.row import COUNTED, FINE, Row
from benchmarks.coverage.tables import smallest_of

FOLDER = Path(__file__).parent / "results"
SIZE_FIELDS = ("name", "family", "parameters", "modules", "result")


def timm_row(
    name: str, family: str, megabytes: float, out: Path | None = None, *, smallest: bool, count: bool = False
) -> Record:
    """The row of one timm model; what `out` has of the same model under another name is not checked again."""
    from benchmarks.coverage.cases import timm_case
    from benchmarks.coverage.check import fill

    row, known = Row(name, family, smallest), dict[str, Record]()
    if out is not None and not smallest:
        known = {
            r["signature"]: r
            for r in read_records(out).values()
            if r.get("signature") and r["result"] in (*FINE, COUNTED)
        }
    return asdict(
        fill(row, lambda: timm_case(name, megabytes, shallow=not smallest), export=smallest, known=known, count=count)
    )


def transformers_row(name: str, family: str, *, count: bool = False) -> Record:
    """The row of one model type of transformers."""
    from benchmarks.coverage.cases import transformers_case
    from benchmarks.coverage.check import fill

    return asdict(fill(Row(name, family), lambda: transformers_case(name), export=True, count=count))


def size_record(name: str, family: str) -> Record:
    """How large a timm model is, without making its weights."""
    import timm
    import torch

    with torch.device("meta"):
        model = timm.create_model(name)
    numbers = sum(parameter.numel() for parameter in model.parameters())
    modules = len(list(model.modules()))
    return {"name": name, "family": family, "parameters": numbers, "modules": modules, "result": "counted"}


def smallest_of_each_family(pairs: list[tuple[str, str]], workers: int) -> list[str]:
    """The model with the fewest parameters of every family of timm."""
    family = dict(pairs)
    records = sweep(
        list(family), lambda name: size_record(name, family[name]), FOLDER / "sizes.csv", fields=SIZE_FIELDS,
        workers=workers,
    )  # fmt: skip
    return list(smallest_of(records).values())


def work_of(options: argparse.Namespace) -> tuple[list[str], Callable[[str], Record], tuple[str, ...]]:
    """The names of a sweep, what is done with each, and the columns of its table."""
    from benchmarks.coverage.cases import timm_names, transformers_names

    if options.zoo == "transformers":
        families = dict(transformers_names())
        count: bool = options.count
        return (
            list(families),
            lambda name: transformers_row(name, families.get(name, name), count=count),
            tuple(Row.names()),
        )
    pairs = timm_names()
    family, small = dict(pairs), smallest_of_each_family(pairs, options.workers)
    if options.zoo == "torch-pruning":
        from benchmarks.coverage import peer

        return small, lambda name: peer.pruned(name, family[name]), peer.FIELDS
    others = [name for name, _ in pairs if name not in small]
    random.Random(0).shuffle(others)  # noqa: S311 -- so that a part of the sweep is a fair sample
    names = small if options.families else [*small, *others]
    return (
        names,
        lambda name: timm_row(
            name, family.get(name, "?"), options.weights, options.out, smallest=name in small, count=options.count
        ),
        tuple(Row.names()),
    )


def write_versions(zoo: str, known: int, folder: Path) -> None:
    """Note what a sweep ran with, beside its table, and how many names there are."""
    counts = folder / "known.json"
    if zoo in ("timm", "transformers"):
        found = json.loads(counts.read_text()) if counts.exists() else {}
        counts.write_text(json.dumps({**found, zoo: known}, indent=1))
    path = folder / "versions.json"
    versions = json.loads(path.read_text()) if path.exists() else {}
    for package in ("torch", "torchvision", zoo):
        with suppress(PackageNotFoundError):
            versions[package] = version(package)
    versions |= {"linearize": linearize.__version__, "Python": platform.python_version()}
    path.write_text(json.dumps(versions, indent=1) + "\n")


def main() -> None:
    """Parse the command line, run the sweep, print the totals."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("zoo", choices=["timm", "transformers", "torch-pruning", "report"])
    parser.add_argument("names", nargs="*", help="models; default: all")
    parser.add_argument("--families", action="store_true", help="timm: only the smallest model of each family")
    parser.add_argument("--again", action="store_true", help="repeat what did not end well")
    parser.add_argument("--count", action="store_true", help="only capture and count activations, compare nothing")
    parser.add_argument("--out", type=Path, help="CSV file; default: results/ZOO.csv beside this program")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 2)
    parser.add_argument("--memory", type=float, default=6, help="GiB per process")
    parser.add_argument("--time", type=int, default=120, help="seconds per model")
    parser.add_argument(
        "--weights",
        type=float,
        default=1000,
        help="MB of weights: beyond it in float64, float32 is used, and beyond it in float32, meta tensors",
    )
    options = parser.parse_args()
    if options.zoo == "report":
        from benchmarks.coverage.report import write_report

        print(write_report(FOLDER))
        return

    os.environ["HF_HUB_OFFLINE"] = "1"
    warnings.filterwarnings("ignore")
    import torch
    import transformers

    import linearize.zoo.tiny  # noqa: F401 -- loaded before the forks

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    out = options.out = options.out or FOLDER / f"{options.zoo}{'-counted' if options.count else ''}.csv"
    out.parent.mkdir(parents=True, exist_ok=True)
    names, work, fields = work_of(options)
    if options.again and out.exists():
        bad = {name for name, record in read_records(out).items() if record["result"] not in FINE}
        names = [name for name in names if name in bad]
    rows = sweep(
        options.names or names,
        work,
        out,
        fields=fields,
        workers=options.workers,
        limits=Limits(options.time, options.memory),
        keep=not (options.again or options.names),
    )
    from benchmarks.coverage.cases import timm_names, transformers_names

    write_versions(
        options.zoo, len(transformers_names() if options.zoo == "transformers" else timm_names()), out.parent
    )
    for result, count in Counter(row["result"] for row in rows).most_common():
        print(f"{count:5d}  {result}")


if __name__ == "__main__":
    main()
