"""What decides for a budget: a plan before training, gates during it, or both; with equal numbers of steps.

A small convolutional network is trained on handwritten digits. Each method compresses it to shares of its FLOPs, and
trains for as many steps, with distillation alone. The table has the accuracy on held-back digits and the divergence
from the original there, as means over seeds with their deviation.

    python benchmarks/methods.py [--seeds 3] [--epochs 8] [--budgets 0.5 0.3 0.15] [--json FILE] [--threads 1]
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn

from linearize.compress import compress
from linearize.data import load_data
from linearize.finetune import finetune
from linearize.planning.request import Method
from linearize.report.timing import write_json
from linearize.text_table import render_markdown
from linearize.training.distance import real_loss

Batches = list[tuple[Tensor, Tensor]]


def network() -> nn.Module:
    """Three convolutions with norms, and two linear layers behind them."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Conv2d(32, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(128, 96), nn.GELU(), nn.Linear(96, 10),
    )  # fmt: skip


def one(model: nn.Module, train: Batches, test: Batches, budget: float, method: Any, epochs: int) -> dict[str, Any]:
    """One compression, and how good it is."""
    tuned = {"epochs": epochs, "lr": 1e-3, "distill_weight": 1.0}
    result = compress(
        model, train, flops=budget, method=method, finetune=tuned, evaluate=test, rounds=0, cache=False, progress=False
    )
    points = [] if result.report.course is None else result.report.course.points
    return {
        "budget": budget,
        "method": method,
        "reached": None if result.report.outcome is None else result.report.outcome.reached,
        "before": result.report.quality["accuracy"]["before"],
        "accuracy": result.report.quality["accuracy"]["collapsed"],
        "divergence": real_loss(model, result.model, test),
        "back": sum(point["back"] for point in points),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Methods against budgets."""
    budgets = list(dict.fromkeys(row["budget"] for row in rows))
    made: list[list[object]] = []
    for method in dict.fromkeys(row["method"] for row in rows):
        cells: list[object] = [method]
        for budget in budgets:
            some = [row for row in rows if (row["method"], row["budget"]) == (method, budget)]
            accuracy, divergence = ([row[name] for row in some] for name in ("accuracy", "divergence"))
            cells.append(f"{_mean(accuracy, 100, 1)}%, {_mean(divergence, 1, 3)}")
        made.append(cells)
    return render_markdown(["", *(f"{budget:g} of the FLOPs" for budget in budgets)], made)


def _mean(values: list[float], factor: float, digits: int) -> str:
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{factor * statistics.fmean(values):.{digits}f} ± {factor * spread:.{digits}f}"


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description="A plan, gates, or both, with equal numbers of steps")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.5, 0.3, 0.15])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "methods.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    digits = load_data("digits", batch_size=64)
    train, test = list(digits.train), list(digits.test)
    rows: list[dict[str, Any]] = []
    for seed in range(options.seeds):
        torch.manual_seed(seed)
        model = network()
        finetune(model, train, epochs=12, lr=3e-3, progress=False)
        for budget in options.budgets:
            for method in get_args(Method):
                rows.append({"seed": seed, **one(model, train, test, budget, method, options.epochs)})
                print(rows[-1], flush=True)
    write_json(options.json, {"epochs": options.epochs, "rows": rows})
    print(table(rows))


if __name__ == "__main__":
    main()
