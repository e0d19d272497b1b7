"""The main job, end to end, on real data: `make demo`.

Handwritten digits, a small vision transformer and a small ConvNeXt of timm: train, convert, calibrate, fine-tune under
the prior to a target share of linear channels, collapse, verify, save, load in a new process, benchmark.

    python benchmarks/demo.py [--out runs/demo] [--linear 0.75] [--seed 0] [--threads 1] [--quick]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from linearize import zoo
from linearize.bench import benchmark
from linearize.checkpoint import load, save
from linearize.compress import compress
from linearize.data import DataSource, load_data
from linearize.errors import LinearizeError
from linearize.finetune import finetune
from linearize.report.compression import Report, outcome_table
from linearize.report.pictures import draw
from linearize.report.timing import write_json
from linearize.running.models import evaluating

CLOCK = time.perf_counter()


@dataclass(frozen=True)
class Job:
    """A model of the demo. Sizes are such that the layers around activations dominate, as in models of real size."""

    title: str
    name: str
    kwargs: dict[str, Any]
    train: int
    finetune: int
    lr: float


JOBS = {
    "vit": Job(
        "Vision transformer",
        "vit_tiny_patch16_224",
        {"img_size": 8, "patch_size": 2, "embed_dim": 96, "depth": 3, "num_heads": 4, "mlp_ratio": 8}
        | {"class_token": False, "global_pool": "avg"},
        train=24,
        finetune=12,
        lr=3e-3,
    ),
    "convnext": Job(
        "ConvNeXt",
        "test_convnext",
        {"patch_size": 1, "kernel_sizes": 3, "dims": [64, 128, 160, 160], "depths": [1, 3, 2, 1], "ls_init_value": 0.1},
        train=10,
        finetune=8,
        lr=2e-3,
    ),
}


def smoothed(output: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross entropy with smoothed labels, which so small a data set asks for."""
    return nn.functional.cross_entropy(output, labels, label_smoothing=0.1)


def say(text: str) -> None:
    """A line of progress with the time since the start."""
    print(f"[{time.perf_counter() - CLOCK:5.0f} s] {text}", flush=True)


def tell(record: dict[str, float]) -> None:
    """A line about an epoch of training."""
    say(f"  epoch {record['epoch']:.0f}, loss {record['loss']:.4f}, accuracy {record['accuracy']:.4f}")


def run_job(key: str, job: Job, data: DataSource, options: argparse.Namespace) -> tuple[Report, dict[str, Any]]:
    """Everything for one model; its files lie in the output folder under its key."""
    torch.manual_seed(options.seed)
    say(f"{job.title}: train timm's {job.name} from random weights")
    model = zoo.create(f"timm:{job.name}", in_chans=data.in_chans, num_classes=data.num_classes, **job.kwargs)
    epochs = 1 if options.quick else job.train
    finetune(model, data.train, epochs=epochs, lr=job.lr, loss=smoothed, evaluate=data.test, clip=None, on_epoch=tell)
    result = compress(
        model,
        data.train,
        linear=options.linear,
        finetune={"epochs": 1 if options.quick else job.finetune, "lr": job.lr, "loss": smoothed, "clip": None},
        evaluate=data.test,
        rounds=0,
        seed=options.seed,
        progress=lambda text: say(f"{job.title}: {text}" if not text.startswith(" ") else text),
    )
    folder: Path = options.out
    original, small = folder / f"{key}-original.safetensors", folder / f"{key}-compressed.safetensors"
    say(f"{job.title}: save, and load in a new process")
    save(model, original)
    save(result.model, small)
    error = check_in_new_process(small, result.model, torch.cat([images for images, _ in data.test]))
    say(f"{job.title}: benchmark")
    images = next(iter(data.test))[0]
    pair = {"original": load(original), "compressed": load(small)}
    sizes, rounds = ([64], 3) if options.quick else ([1, 64, 256], 21)
    timing = benchmark(pair, images, batch_sizes=sizes, rounds=rounds)
    facts = {
        "model": f"timm:{job.name}",
        "kwargs": job.kwargs,
        "original": str(original),
        "compressed": str(small),
        "reloaded_error": error,
    }
    return replace(result.report, timing=timing), facts


def check_in_new_process(file: Path, model: nn.Module, inputs: torch.Tensor) -> float:
    """Largest difference between a model here and from its file in a new process, relative to the largest output.

    The new process is given the file, inputs and outputs, and nothing else.
    """
    with evaluating(model):
        expected = model(inputs)
    given = file.with_suffix(".check")
    save_file({"inputs": inputs.contiguous(), "expected": expected.contiguous()}, given)
    try:
        command = [sys.executable, __file__, "--check", str(file), str(given), str(torch.get_num_threads())]
        found = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    finally:
        given.unlink()
    return float(json.loads(found.stdout)["error"])


def check(file: str, given: str, threads: str) -> None:
    """What the new process does."""
    torch.set_num_threads(int(threads))
    model, tensors = load(file), load_file(given)
    with evaluating(model):
        difference = model(tensors["inputs"]) - tensors["expected"]
    print(json.dumps({"error": float(difference.abs().max() / tensors["expected"].abs().max())}))


def parse() -> argparse.Namespace:
    """Options of the command line."""
    parser = argparse.ArgumentParser(description="The main job of linearize, end to end, on handwritten digits.")
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder for models, report and picture")
    parser.add_argument("--linear", type=float, default=0.75, help="share of channels that shall be linear")
    parser.add_argument("--seed", type=int, default=0, help="of weights and orders")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads; one is steadier on a shared machine")
    parser.add_argument("--only", choices=list(JOBS), help="one model only")
    parser.add_argument("--quick", action="store_true", help="little of everything: a test of the demo itself")
    return parser.parse_args()


def main() -> None:
    """Run all jobs and end with one table."""
    options = parse()
    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    data = load_data("digits", batch_size=32, seed=options.seed, limit=96 if options.quick else None)
    say(f"handwritten digits: {len(data.train.images)} images to train on, {len(data.test.images)} to test on")
    jobs = {key: job for key, job in JOBS.items() if options.only in (None, key)}
    done = {job.title: run_job(key, job, data, options) for key, job in jobs.items()}
    reports = {title: report for title, (report, _) in done.items()}
    table = outcome_table(reports)
    plain = {title: {**facts, **report.to_dict()} for title, (report, facts) in done.items()}
    write_json(options.out / "report.json", plain)
    (options.out / "table.md").write_text(outcome_table(reports, markdown=True) + "\n", encoding="utf-8")
    draw(plain, options.out / "demo.png")
    print(f"\n{table}\n")
    for title, (report, facts) in done.items():
        print(f"{title}: {facts['compressed']} (in a new process: largest difference {facts['reloaded_error']:.1e})")
        if not report.verification or facts["reloaded_error"] > 1e-5:
            sys.exit(f"{title}: the collapsed or the loaded model is another function than the gated one")
    print(f"Report and picture: {options.out / 'report.json'}, {options.out / 'demo.png'}")
    say(f"done, on {options.threads} thread(s)")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--check"]:
        check(*sys.argv[2:5])
    else:
        try:
            main()
        except LinearizeError as error:
            sys.exit(f"error: {error}")
