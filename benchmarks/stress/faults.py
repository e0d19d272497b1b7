"""Faults: kills, interrupts, damaged files and wrong calls, counted.

Run: python -m benchmarks.stress.faults [PART ...] [--count N] [--out FILE]

Every kill and every damaged file must end, after the same call again, in the result of a run that was never
disturbed, bit for bit; every wrong call must end in an error of linearize. Where the program was stopped, it goes on:
each case has a seed of its own, and what has been counted stays in the file.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import linearize
from benchmarks.runs import machine
from benchmarks.stress import damage, kills, toys, wrong
from linearize.report.timing import write_json

__all__ = ["COUNTS", "Tally", "run"]

RESULTS = Path(__file__).parent / "results" / "faults.json"
COUNTS = {**{f"kill: {name}": 40 for name in kills.TARGETS}, "interrupt": 200, "checkpoint": 1000, "notes": 1000}
"""How many cases of each part there are in all; beside them stand all wrong calls."""

_SOME = 10
_BAD = ("another result", "foreign error")


@dataclass
class Tally:
    """What came out, by outcome, and where it was bad."""

    done: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    bad: list[str] = field(default_factory=list)
    clean: list[str] = field(default_factory=list)  # the first errors of linearize
    seconds: float = 0.0

    def add(self, outcome: str, told: str = "") -> None:
        """Count a case."""
        self.done += 1
        self.outcomes[outcome] += 1
        if outcome in _BAD:
            self.bad.append(told[-600:])
        elif outcome == "clean error" and len(self.clean) < _SOME:
            self.clean.append(told[-600:])

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "cases": self.done,
            "outcomes": dict(sorted(self.outcomes.items())),
            "bad": self.bad,
            "clean errors": self.clean,
            "seconds": round(self.seconds),
        }

    @classmethod
    def of(cls, held: dict[str, Any]) -> Tally:
        """What `to_dict` gave."""
        return cls(
            held["cases"],
            Counter(held["outcomes"]),
            list(held["bad"]),
            list(held["clean errors"]),
            float(held["seconds"]),
        )


def run(part: str, count: int, tally: Tally, folder: Path, save: Callable[[], None] = lambda: None) -> Tally:
    """Go on with a part until so many cases have been counted."""
    logging.getLogger("linearize").setLevel(logging.CRITICAL)  # each damaged file is told of in a line
    one = _case(part, folder)
    since = 0.0
    while tally.done < count:
        start = time.perf_counter()
        outcome, told = one(random.Random(f"{part} {tally.done} {sum(tally.outcomes.values())}"))  # noqa: S311
        tally.seconds += time.perf_counter() - start
        since += time.perf_counter() - start
        tally.add(outcome, told)
        if since > 20:
            since = 0.0
            save()
    save()
    return tally


def _case(part: str, folder: Path) -> Callable[[random.Random], tuple[str, str]]:
    if part.startswith("kill: "):
        kills.warm(folder / "warm", [part.removeprefix("kill: ")])
        return lambda rng: _killed(part.removeprefix("kill: "), folder / "kill", rng)
    if part == "interrupt":
        kills.warm(folder / "warm", ["compress"])
        return _interrupted
    return _Damaged(part, folder).case


def _killed(name: str, folder: Path, rng: random.Random) -> tuple[str, str]:
    """Kill until it was in time; a run that had ended before is no case."""
    for _ in range(50):
        killed, told = kills.kill(name, folder, rng)
        if killed:
            return ("another result" if told == "another result" else "foreign error", told) if told else ("equal", "")
        if told:
            return "foreign error", told
    return "never in time", ""


def _interrupted(rng: random.Random) -> tuple[str, str]:
    for _ in range(50):
        stopped, told = kills.interrupt(rng, 1.2)
        if told == kills.ABORTED:
            return "ended by torch", ""
        if stopped:
            return ("another result", told) if told else ("model as it was", "")
    return "never in time", ""


class _Damaged:
    """Damage to the files of an interrupted run, and the same call again."""

    def __init__(self, part: str, folder: Path) -> None:
        self.part, self.copy, self.kept = part, folder / "copy", folder / f"kept {part}"
        self.job = toys.finetune_job if part == "checkpoint" else _compress
        self.expected = self.job(folder / f"whole {part}")
        shutil.rmtree(self.kept, ignore_errors=True)
        with suppress(KeyboardInterrupt):
            self.job(self.kept, **_stopping(part))
        self.files = [path.relative_to(self.kept) for path in sorted(self.kept.rglob("*")) if path.is_file()]
        if len(self.files) < 2:
            raise RuntimeError(f"found {self.files} of an interrupted run")

    def case(self, rng: random.Random) -> tuple[str, str]:
        """Damage one file or all of them."""
        shutil.rmtree(self.copy, ignore_errors=True)
        shutil.copytree(self.kept, self.copy)
        done, forged = [], False
        for name in self.files if rng.random() < 0.2 else [rng.choice(self.files)]:
            path = self.copy / name
            how = damage.forge if path.suffix == ".safetensors" and rng.random() < 0.4 else damage.spoil
            forged = forged or how is damage.forge
            done.append(f"{name}: {how(path, rng)}")
        try:
            found = self.job(self.copy)
        except linearize.LinearizeError as error:
            return "clean error", f"{done} {error}"
        except Exception as error:
            return "foreign error", f"{done} {type(error).__name__}: {error}"
        told = found.keys() - {"history"}  # where a forged file told less of past epochs, so do we
        same = all(found[key] == self.expected[key] for key in (told if forged else found))
        return ("equal", "") if same else ("another result", f"{done}")


def _compress(folder: Path, **options: Any) -> dict[str, Any]:
    return toys.compress_job(folder, epochs=1, search=1, **options)


def _stopping(part: str) -> dict[str, Any]:
    """Options with which a job stops itself in the middle."""

    def stop(told: Any) -> None:
        if (isinstance(told, dict) and told["epoch"] == 2) or (isinstance(told, str) and "epoch 1" in told):
            raise KeyboardInterrupt

    return {"on_epoch": stop} if part == "checkpoint" else {"progress": stop}


def wrong_calls(folder: Path, every: int = 1) -> Tally:
    """All wrong calls, or each of so many."""
    tally = Tally()
    start = time.perf_counter()
    for place, (name, call) in enumerate(wrong.calls(folder)):
        if place % every:
            continue
        try:
            call()
        except linearize.LinearizeError as error:
            tally.add("clean error", f"{name}: {error}")
        except Exception as error:
            tally.add("foreign error", f"{name}: {type(error).__name__}: {error}")
        else:
            tally.add("accepted")
            tally.bad.append(f"{name}: accepted")
    tally.seconds = time.perf_counter() - start
    return tally


def main() -> None:
    """Run what is asked for, and write what came out."""
    parts = [*COUNTS, "wrong calls"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(parts)}; all without")
    parser.add_argument("--count", type=int, help="cases of each part, in place of its own number")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the file of results")
    given = parser.parse_args()
    chosen = given.parts or parts
    if len(chosen) > 1:  # after gradients were computed in a process, none that is forked from it could compute any
        for part in chosen:
            more = [] if given.count is None else ["--count", str(given.count)]
            command = [sys.executable, "-m", "benchmarks.stress.faults", part, "--out", str(given.out), *more]
            subprocess.run(command, check=True)
        return
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    held = json.loads(given.out.read_text()) if given.out.exists() else {}
    tallies = {name: Tally.of(tally) for name, tally in held.get("parts", {}).items()}

    def save() -> None:
        told = {name: tally.to_dict() for name, tally in tallies.items()}
        write_json(given.out, {"machine": machine(), "parts": told})

    given.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        for part in chosen:
            if part == "wrong calls":
                tallies[part] = wrong_calls(Path(name))
                save()
            else:
                run(part, given.count or COUNTS[part], tallies.setdefault(part, Tally()), Path(name), save)
            tally = tallies[part]
            print(f"{part}: {tally.done} cases in {tally.seconds:.0f} s, {dict(tally.outcomes)}", flush=True)
            for told in tally.bad[:20]:
                print(f"  {told}")


if __name__ == "__main__":
    main()
