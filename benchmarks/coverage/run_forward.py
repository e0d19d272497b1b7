"""Which transformers model types run a forward pass on a tiny configuration and derived example inputs.

Run: python -m benchmarks.coverage.run_forward [TYPE ...] [--out forward.csv] [--workers 1]

What the file has already is kept, so that an interrupted run goes on; delete it to start afresh. A row: type,
result ("runs" or the reason), size level, class, parameters, seconds.
"""

from __future__ import annotations

import argparse
import os
import time
import warnings
from functools import partial
from pathlib import Path

from benchmarks.coverage.pool import Limits, Record, sweep

FIELDS = ("name", "result", "level", "model", "parameters", "seconds")


def attempt(model_type: str, levels: int) -> Record:
    """Try the sizes of a type, smallest first, until a forward pass runs."""
    import torch

    from linearize.errors import LinearizeError
    from linearize.zoo import example_inputs, tiny

    torch.manual_seed(0)
    start = time.perf_counter()
    record: Record = {"name": model_type, "result": "not tried"}
    try:
        for level, model in tiny.tiny_models(model_type, levels=range(levels)):
            size = sum(parameter.numel() for parameter in model.parameters())
            found: Record = {"name": model_type, "level": level, "model": type(model).__name__, "parameters": size}
            try:
                args, kwargs = example_inputs(model)
                with torch.no_grad():
                    model(*args, **kwargs)
                found["result"] = "runs"
            except Exception as error:
                found["result"] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            # The first failure tells most; a gentler size that runs replaces it.
            if "level" not in record or found["result"] == "runs":
                record = found
            if record["result"] == "runs":
                break
    except LinearizeError as error:
        record["result"] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return {**record, "seconds": round(time.perf_counter() - start, 2)}


def main() -> None:
    """Parse the command line, run the sweep, print the count."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("types", nargs="*", help="model types; default: all that have a model class")
    parser.add_argument("--out", type=Path, default=Path("forward.csv"))
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--memory", type=float, default=6, help="GiB per process")
    parser.add_argument("--time", type=int, default=60, help="seconds per type")
    parser.add_argument("--levels", type=int, default=5, help="sizes to try, smallest first")
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
    work, limits = partial(attempt, levels=options.levels), Limits(options.time, options.memory)
    records = sweep(types, work, options.out, fields=FIELDS, workers=options.workers, limits=limits)
    print(f"{sum(record['result'] == 'runs' for record in records)} of {len(records)} model types run")


if __name__ == "__main__":
    main()
