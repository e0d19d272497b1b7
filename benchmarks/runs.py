"""Runs whose results are files: an interrupted program goes on where it stopped.

Every run has a name and gives plain data, kept in FOLDER/NAME.json together with what it was asked to do. A file that
was asked something else is computed again.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from linearize.report.timing import environment, write_json
from linearize.running.progress import progress_bar

__all__ = ["Job", "arguments", "finished", "machine", "named", "publish", "run_all", "wanted"]

ROOT = Path(__file__).resolve().parents[1]
Plain = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """One run.

    Attributes:
        name: of its file.
        asked: all that the result depends on; plain data.
        work: what is called if the file does not exist yet.
    """

    name: str
    asked: Plain
    work: Callable[[], Plain]


def named(experiment: str, seed: int, parts: Sequence[str] = ()) -> str:
    """The name of a run; of a part of one, with what is in it.

    Example:
        >>> named("images-vit", 0, ["plan, latency"])
        'images-vit-0-plan_latency'
    """
    return "-".join([experiment, str(seed), *(part.replace(",", "").replace(" ", "_") for part in parts)])


def wanted(name: str, methods: Sequence[str]) -> bool:
    """Whether a method is one of those that were asked for; none asked for means all."""
    return not methods or name in methods


def run_all(jobs: Sequence[Job], folder: Path, label: str) -> list[Plain]:
    """The results of all jobs, in order; what a file holds already is not computed again.

    Each result is `asked`, what `work` gave, and "seconds".
    """
    folder.mkdir(parents=True, exist_ok=True)
    found: list[Plain] = []
    with progress_bar(label, len(jobs)) as advance:
        for place, job in enumerate(jobs):
            path = folder / f"{job.name}.json"
            known = _read(path, job.asked)
            if known is None:
                begin = time.perf_counter()
                known = {**job.asked, **job.work(), "seconds": round(time.perf_counter() - begin, 2)}
                write_json(path, known)
                if not sys.stderr.isatty():
                    print(f"{label} {place + 1}/{len(jobs)}: {job.name}, {known['seconds']:.0f} s", flush=True)
            found.append(known)
            advance(job.name)
    return found


def finished(jobs: Sequence[Job], folder: Path) -> list[Plain]:
    """The results of those jobs that have been done."""
    found = (_read(folder / f"{job.name}.json", job.asked) for job in jobs)
    return [result for result in found if result is not None]


def _read(path: Path, asked: Plain) -> Plain | None:
    """What a file holds, if it is the answer to the same question."""
    if not path.is_file():
        return None
    try:
        held: Plain = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError:
        return None
    plain = json.loads(json.dumps(asked))
    return held if all(held.get(key) == value for key, value in plain.items()) else None


def machine() -> str:
    """What kind of machine the figures come from, such as "2 cores, torch 2.15.0"."""
    facts = environment(torch.device("cpu"), torch.float32)
    return f"{facts['cores']} cores, {facts['threads']} in use, torch {facts['torch'].partition('+')[0]}"


def arguments(title: str, folder: str) -> argparse.ArgumentParser:
    """The options that programs with runs share."""
    parser = argparse.ArgumentParser(description=title)
    parser.add_argument("--out", type=Path, help=f"folder for runs, results and pictures ({folder})")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="about a minute: a test of the program itself")
    size.add_argument("--full", action="store_true", help="more seeds and larger sizes: hours")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--publish", action="store_true", help="copy results and pictures to where they are committed")
    return parser


def publish(results: Path, pictures: Mapping[str, Path]) -> None:
    """Copy results and pictures to benchmarks/results and docs/images; the keys are names of pictures there."""
    shutil.copyfile(results, ROOT / "benchmarks" / "results" / results.name)
    for name, picture in pictures.items():
        shutil.copyfile(picture, ROOT / "docs" / "images" / name)
