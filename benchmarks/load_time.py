"""How long `linearize.load` takes against reading the file: target at most 2 x, for a ViT-base.

Run: python benchmarks/load_time.py [--model timm:vit_base_patch16_224] [--rounds 15] [--json FILE]

Each round runs the four of them one after the other, so that the machine's moods hit all alike; a ratio is the
median of the ratios within rounds, with its quartiles.

- read: the file's bytes into memory;
- load: `linearize.load`, which maps the tensors and reads them when they are first used;
- touch: safetensors' `load_file`, then one read in each page of each tensor;
- load + touch: `linearize.load`, then the same.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import linearize
from linearize.checkpoint import load, save
from linearize.zoo import create

PAGE = 4096


def touch(tensors: Iterable[Tensor]) -> None:
    """Read one value in each page of memory."""
    for tensor in tensors:
        flat = tensor.detach().view(-1)
        flat[:: max(1, PAGE // flat.element_size())].sum()


def seconds(action: Callable[[], object]) -> float:
    """Time one call."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile."""
    low, middle, high = statistics.quantiles(values, n=4)
    return low, middle, high


def measure(model: nn.Module, rounds: int) -> dict[str, object]:
    """Save a model, load it again `rounds` times, and compare with reading the file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        saving = seconds(lambda: save(model, path))
        actions: dict[str, Callable[[], object]] = {
            "read": path.read_bytes,
            "load": lambda: load(path),
            "touch": lambda: touch(load_file(path).values()),
            "load + touch": lambda: touch(load(path).state_dict().values()),
        }
        for action in actions.values():
            action()
        times: dict[str, list[float]] = {name: [] for name in actions}
        for _ in range(rounds):
            for name, action in actions.items():
                times[name].append(seconds(action))
        ratios = {}
        for name, other in (("load", "read"), ("load + touch", "read"), ("load + touch", "touch")):
            ratios[f"{name} / {other}"] = quartiles([a / b for a, b in zip(times[name], times[other], strict=True)])
        return {
            "bytes": path.stat().st_size,
            "save": saving,
            "seconds": {name: statistics.median(values) for name, values in times.items()},
            "ratios": ratios,
        }


def main() -> None:
    """Measure base, gated and collapsed model, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="timm:vit_base_patch16_224")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    base = create(options.model)
    gated = linearize.convert(base)
    for gate in linearize.gates(gated).values():
        gate.linearize_(torch.rand(gate.channels) < 0.5)
    found = {}
    for name, model in (("base", base), ("gated", gated), ("collapsed", linearize.collapse(gated))):
        found[name] = measure(model, options.rounds)
        print(f"{name}: {found[name]['bytes']} bytes, saved in {found[name]['save']:.2f} s")
        for pair, (low, middle, high) in found[name]["ratios"].items():  # type: ignore[attr-defined]
            print(f"  {pair:22s} {middle:5.2f}   quartiles {low:.2f} to {high:.2f}")
        print("  seconds:", {k: round(v, 4) for k, v in found[name]["seconds"].items()})  # type: ignore[attr-defined]
    if options.json:
        options.json.write_text(json.dumps({"torch": torch.__version__, "model": options.model, **found}, indent=1))


if __name__ == "__main__":
    main()
