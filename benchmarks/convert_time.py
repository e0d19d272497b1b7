"""How long `convert` and `collapse` take: targets at most 2 x one `torch.export`, and under 5 seconds, for a ViT-base.

    python benchmarks/convert_time.py [--model vit_base_patch16_224] [--rounds 9] [--threads 2] [--json FILE]

Each round exports, converts and collapses the same model once, in an order that alternates between rounds, so that a
busy machine slows all alike; a ratio is the median of the ratios within rounds, with its quartiles. A first round that
is not counted pays for what Python imports on first use. Half of the channels, drawn at random, are linear.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import linearize
from linearize.report.timing import environment, quartiles, write_json
from linearize.text_table import render

HERE = Path(__file__).resolve().parent


def seconds(action: Callable[[], object]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def half_linear(model: nn.Module, images: torch.Tensor) -> nn.Module:
    """The converted model with half of the channels of every gate linear."""
    gated = linearize.convert(model, images)
    for gate in linearize.gates(gated).values():
        gate.linearize_(torch.randperm(gate.channels) < gate.channels // 2)
    return gated


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of every action in every round, and the ratios within rounds, as plain data."""
    import timm

    torch.manual_seed(0)
    model = timm.create_model(options.model).eval()
    images = torch.randn(1, *model.default_cfg["input_size"])
    gated = half_linear(model, images)

    def export() -> None:
        with torch.no_grad():
            torch.export.export(model, (images,), strict=False)

    actions: dict[str, Callable[[], object]] = {
        "export": export,
        "convert": lambda: linearize.convert(model, images),
        "collapse": lambda: linearize.collapse(gated),
        "copy": lambda: copy.deepcopy(model),
    }
    times: dict[str, list[float]] = {name: [] for name in actions}
    for action in actions.values():
        action()
    for turn in range(options.rounds):
        for name in actions if turn % 2 == 0 else reversed(actions):
            times[name].append(seconds(actions[name]))
    ratios = {
        name: quartiles([a / b for a, b in zip(times[name], times["export"], strict=True)])
        for name in actions
        if name != "export"
    }
    return {
        "model": options.model,
        "parameters": sum(p.numel() for p in model.parameters()),
        "sites": len(linearize.gates(gated)),
        "environment": {**environment(torch.device("cpu"), torch.float32), "timm": timm.__version__},
        "rounds": options.rounds,
        "seconds": {name: quartiles(values) for name, values in times.items()},
        "ratio_to_export": ratios,
    }


def table(found: dict[str, Any]) -> str:
    """One row per action."""
    targets = {"convert": "ratio <= 2", "collapse": "< 5 s"}
    rows = []
    for name, (low, middle, high) in found["seconds"].items():
        ratio = found["ratio_to_export"].get(name)
        of_export = f"{ratio[1]:.2f} [{ratio[0]:.2f}, {ratio[2]:.2f}]" if ratio else None
        rows.append([name, f"{middle:.2f} [{low:.2f}, {high:.2f}]", of_export, targets.get(name, "")])
    facts = found["environment"]
    title = f"{found['model']}, {found['parameters'] / 1e6:.0f} M parameters, {found['sites']} sites; "
    title += f"{facts['device']}, {facts['threads']} threads, {facts['dtype']}, torch {facts['torch']}, "
    title += f"timm {facts['timm']}, Python {facts['python']}, {found['rounds']} rounds"
    return title + "\n" + render(["action", "seconds [quartiles]", "of one export [quartiles]", "target"], rows)


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_base_patch16_224", help="a timm model")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, default=HERE / "results" / "convert_time.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    found = measure(options)
    print(table(found))
    options.json.parent.mkdir(parents=True, exist_ok=True)
    write_json(options.json, found)


if __name__ == "__main__":
    main()
