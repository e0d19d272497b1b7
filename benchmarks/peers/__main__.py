"""Compression methods side by side: same model, same data, same fine-tuning, latencies in one process.

    python -m benchmarks.peers {images,units,text,sentences,photographs,report} [--quick | --full] [--seeds N] ...

See README.md.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.runs import Job, Plain, arguments, machine, publish, run_all
from linearize.report.timing import write_json

EXPERIMENTS = ("images", "units", "text", "sentences", "photographs")


def jobs_of(experiment: str, options: argparse.Namespace, out: Path) -> list[Job]:
    """The runs of an experiment."""
    from benchmarks.peers import images, photographs, sentences, text, units

    def size(room: Any) -> Any:
        found = room.QUICK if options.quick else room.FULL if options.full else room.Size()
        return replace(found, methods=tuple(options.method)) if options.method else found

    several = options.seeds or (1 if options.quick else 3)  # where a seed decides the original's weights
    if experiment == "images":
        return images.jobs(size(images), several, options.images, out, timing_only=options.latencies)
    if experiment == "units":
        return units.jobs(size(units), several, options.images)
    if experiment == "text":
        return text.jobs(size(text), several, timing_only=options.latencies)
    if experiment == "sentences":
        return sentences.jobs(size(sentences), options.seeds or 1, timing_only=options.latencies)
    return photographs.jobs(size(photographs), options.seeds or 1, options.photographs, options.weights, out)


def report(out: Path, *, published: bool) -> None:
    """Tables, pictures and one file of all runs that have been done."""
    from benchmarks.peers.page import PAGE, fill
    from benchmarks.peers.pictures import draw_all
    from benchmarks.peers.tables import markdown, names_of

    paths = sorted((out / "runs").glob("*.json"), key=lambda path: path.stem)
    results: list[Plain] = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    results.sort(key=lambda result: EXPERIMENTS.index(result["experiment"]))
    if not results:
        raise SystemExit(f"There are no runs in {out / 'runs'}.")
    write_json(out / "peers.json", {"machine": machine(), "runs": results})
    pictures = draw_all(results, out)
    for experiment, network in names_of(results):
        print(markdown(results, experiment, network) + "\n")
    if published:
        publish(out / "peers.json", pictures)
        PAGE.write_text(fill(PAGE.read_text(encoding="utf-8"), results), encoding="utf-8")


def main() -> None:
    """Run what is asked for, or report what has been done."""
    parser = arguments("Compression methods side by side", "runs/peers")
    parser.add_argument("experiment", choices=(*EXPERIMENTS, "report"))
    parser.add_argument("--seeds", type=int, help="how many")
    parser.add_argument("--only", default="", help="only runs whose names begin like this")
    parser.add_argument("--method", action="append", help="only this one, in a run of its own")
    parser.add_argument("--latencies", action="store_true", help="only those; for images, text and sentences")
    parser.add_argument("--images", type=Path, default=Path("/usr/share/datasets/fashion-mnist"))
    parser.add_argument("--photographs", type=Path, help="folder of photographs")
    parser.add_argument("--weights", type=Path, help="weights of EfficientNet-Lite0")
    options = parser.parse_args()
    if options.latencies and options.experiment in ("units", "photographs"):
        parser.error("--latencies is for images, text and sentences")
    torch.set_num_threads(options.threads)
    out: Path = options.out or Path("runs/peers")
    if options.experiment == "report":
        report(out, published=options.publish)
        return
    jobs = [job for job in jobs_of(options.experiment, options, out) if job.name.startswith(options.only)]
    run_all(jobs, out / "runs", options.experiment)


if __name__ == "__main__":
    main()
