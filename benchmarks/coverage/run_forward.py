"""Which transformers model types run a forward pass on a tiny configuration and derived example inputs.

Run: python benchmarks/coverage/run_forward.py [TYPE ...] [--out forward.csv] [--workers 1] [--resume]

Each type runs in a process of its own, forked from one that has the library loaded, with limits on time and memory.
A row of the CSV: type, result ("runs" or the reason), size level, class, parameters, seconds.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import resource
import select
import signal
import time
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path

FIELDS = ("type", "result", "level", "model", "parameters", "seconds")


@dataclass
class Row:
    """The outcome for one model type."""

    type: str
    result: str
    level: int = -1
    model: str = ""
    parameters: int = 0
    seconds: float = 0.0


def attempt(model_type: str, levels: int) -> Row:
    """Try the sizes of a type, smallest first, until a forward pass runs."""
    import torch

    from linearize.errors import LinearizeError
    from linearize.zoo import example_inputs, tiny

    torch.manual_seed(0)
    start, row = time.perf_counter(), Row(model_type, "not tried")
    try:
        for level, model in tiny.tiny_models(model_type, levels=range(levels)):
            found = Row(model_type, "", level, type(model).__name__, sum(p.numel() for p in model.parameters()))
            try:
                args, kwargs = example_inputs(model)
                with torch.no_grad():
                    model(*args, **kwargs)
                found.result = "runs"
            except Exception as error:
                found.result = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            # The first failure tells most; a gentler size that runs replaces it.
            if row.level < 0 or found.result == "runs":
                row = found
            if row.result == "runs":
                break
    except LinearizeError as error:
        row.result = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    row.seconds = round(time.perf_counter() - start, 2)
    return row


def start(model_type: str, levels: int, gigabytes: float, seconds: int) -> tuple[int, int]:
    """Fork a process for one type: its id, and the pipe that its row comes through."""
    reader, writer = os.pipe()
    child = os.fork()
    if child:
        os.close(writer)
        return child, reader
    os.close(reader)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limit = used + int(gigabytes * 2**30)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    signal.alarm(seconds)
    try:
        os.write(writer, json.dumps(asdict(attempt(model_type, levels))).encode())
    except BaseException as error:  # the parent must hear of everything
        os.write(writer, json.dumps(asdict(Row(model_type, f"{type(error).__name__}: {error}"[:300]))).encode())
    os._exit(0)


def finish(model_type: str, child: int, reader: int) -> Row:
    """Collect the row of a process that has ended or is about to."""
    with os.fdopen(reader, "rb") as pipe:
        text = pipe.read()
    _, status = os.waitpid(child, 0)
    if text:
        return Row(**json.loads(text))
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGALRM:
        return Row(model_type, "time limit")
    return Row(model_type, f"the process died with status {status}")


def read(out: Path) -> dict[str, Row]:
    """The rows of an earlier sweep."""
    with out.open() as file:
        return {
            row["type"]: Row(
                row["type"],
                row["result"],
                int(row["level"]),
                row["model"],
                int(row["parameters"]),
                float(row["seconds"]),
            )
            for row in csv.DictReader(file)
        }


def sweep(types: list[str], options: argparse.Namespace) -> list[Row]:
    """Run all types and write the rows, sorted, after each."""
    out: Path = options.out
    rows = read(out) if options.resume and out.exists() else {}
    waiting = [name for name in types if name not in rows]
    total, running = len(waiting), dict[int, tuple[str, int]]()
    while waiting or running:
        while waiting and len(running) < options.workers:
            name = waiting.pop(0)
            child, reader = start(name, options.levels, options.memory, options.time)
            running[reader] = (name, child)
        for reader in select.select(list(running), [], [])[0]:
            name, child = running.pop(reader)
            rows[name] = finish(name, child, reader)
            done = total - len(waiting) - len(running)
            print(f"[{done}/{total}] {name}: {rows[name].result[:100]}", flush=True)
        with out.open("w", newline="") as file:
            writer = csv.DictWriter(file, FIELDS)
            writer.writeheader()
            writer.writerows(asdict(rows[name]) for name in sorted(rows))
    return [rows[name] for name in types]


def main() -> None:
    """Parse the command line, run the sweep, print the count."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("types", nargs="*", help="model types; default: all that have a model class")
    parser.add_argument("--out", type=Path, default=Path("forward.csv"))
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--memory", type=float, default=6, help="GiB per process")
    parser.add_argument("--time", type=int, default=60, help="seconds per type")
    parser.add_argument("--levels", type=int, default=4, help="sizes to try, smallest first")
    parser.add_argument("--resume", action="store_true", help="keep the rows that are in the file")
    options = parser.parse_args()

    os.environ["HF_HUB_OFFLINE"] = "1"
    warnings.filterwarnings("ignore")
    import torch
    import transformers
    from transformers.models.auto import modeling_auto

    import linearize.zoo.tiny  # noqa: F401 -- loaded before the forks

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    types = options.types or sorted(modeling_auto.MODEL_MAPPING_NAMES)
    rows = sweep(types, options)
    print(f"{sum(row.result == 'runs' for row in rows)} of {len(rows)} model types run")


if __name__ == "__main__":
    main()
