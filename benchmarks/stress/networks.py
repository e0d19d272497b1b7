"""Random networks by the thousand through the whole chain; goes on where it stopped.

    python -m benchmarks.stress.networks --to 10000 --workers 2     # seeds 0 to 9999, those that are done left out
    python -m benchmarks.stress.networks --seed 123                 # one network: its source, and what it came to
    python -m benchmarks.stress.networks --again                    # the mismatches once more, with today's code

The results (counts of what was compared and what collapsed, and every mismatch with its seed) are in
benchmarks/stress/results/networks.json. A run that reached too little ends with an error: nothing was shown then.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import signal
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch

from benchmarks.stress.chain import Mismatch, Outcome, check
from tests.random_features import FEATURES, add_feature
from tests.random_networks import Writer, network

RESULTS = Path(__file__).parent / "results" / "networks.json"
BLOCK = 50  # seeds per process: captures leave memory behind
LIMIT = 120  # seconds per network
MEMORY = 6 * 2**30
COLLAPSED = ("merged", "vanished", "factored", "merged (input)", "block", "bordered block", "narrowed")
# Shares of the networks that run, which must reach each comparison; below, the run has shown too little.
LEAST = {
    "model left alone": 0.8,
    "gated, eval, without gradients": 0.8,
    "gated, eval, with gradients": 0.7,
    "gated, train, without gradients": 0.7,
    "gated, train, with gradients": 0.6,
    "collapsed, without gradients": 0.7,
    "collapsed, with gradients": 0.6,
    "gated, loaded, without gradients": 0.6,
    "collapsed, loaded, without gradients": 0.6,
    "collapsed, loaded, with gradients": 0.5,
    "other shapes": 0.7,
    "an attribute set afterwards": 0.01,
}


class Tally:
    """What a number of networks came to, as plain data that adds up."""

    def __init__(self, known: dict[str, Any] | None = None) -> None:
        known = known or {}
        self.networks: int = known.get("networks", 0)
        self.reached = Counter(known.get("networks that reached", {}))
        self.comparisons = Counter(known.get("comparisons", {}))
        self.features = Counter(known.get("features", {}))
        self.forms = Counter(known.get("sites", {}))
        self.refused = Counter(known.get("refused", {}))
        self.mismatches: list[dict[str, Any]] = list(known.get("mismatches", []))

    def add(self, features: Iterable[str], outcome: Outcome) -> None:
        """Count one network."""
        self.networks += 1
        self.reached.update(outcome.reached.keys())
        self.comparisons.update(outcome.reached)
        self.forms.update(outcome.forms)
        if outcome.reached:
            self.features.update(set(features))
        if outcome.refused:
            self.refused[outcome.refused] += 1

    def merge(self, other: Tally) -> None:
        """Count the networks of another tally too."""
        self.networks += other.networks
        for name in ("reached", "comparisons", "features", "forms", "refused"):
            getattr(self, name).update(getattr(other, name))
        self.mismatches += other.mismatches

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        counts = {
            "networks that reached": self.reached,
            "comparisons": self.comparisons,
            "features": self.features,
            "sites": self.forms,
            "refused": self.refused,
        }
        plain = {name: dict(sorted(counter.items())) for name, counter in counts.items()}
        return {"networks": self.networks, "collapsed sites": self.collapsed, **plain, "mismatches": self.mismatches}

    @property
    def collapsed(self) -> int:
        """Sites that are smaller or gone."""
        return sum(self.forms[name] for name in COLLAPSED)

    def shortfalls(self) -> list[str]:
        """What was reached too rarely for the run to have shown anything."""
        ran = self.networks - self.refused["the network does not run"]
        found = [
            f"{name}: {self.reached[name]} of {ran} networks, at least {share:.0%} wanted"
            for name, share in LEAST.items()
            if self.reached[name] < share * max(1, ran)
        ]
        if self.collapsed < 0.5 * max(1, ran):
            found.append(f"{self.collapsed} sites collapsed in {ran} networks")
        if ran >= 20 * len(FEATURES):
            found += [f"feature {name} never got through" for name in FEATURES if not self.features[name]]
        return found


def _too_long(*_: Any) -> None:
    raise TimeoutError(f"longer than {LIMIT} s")


def tally_of(seeds: Sequence[int], feature: Callable[[Writer], str] | None = add_feature) -> Tally:
    """Take the networks of some seeds through the chain, in this process; without `feature`, plain ones."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    found = Tally()
    for seed in seeds:
        features: tuple[str, ...] = ()
        try:
            made = network(seed, feature)
            features = made.features
            found.add(features, check(seed, made))
        except Exception as error:
            found.networks += 1
            kind = "" if isinstance(error, Mismatch) else f"{type(error).__name__}: "
            text = f"{kind}{' '.join(str(error).split())[:300]}"
            found.mismatches.append({"seed": seed, "features": list(features), "found": text})
    return found


def _block(seeds: range) -> Tally:
    """The same in a process of its own: with limits."""
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    signal.signal(signal.SIGALRM, _too_long)
    found = Tally()
    for seed in seeds:
        signal.alarm(LIMIT)
        found.merge(tally_of([seed]))
        signal.alarm(0)
    return found


def sweep(first: int, stop: int, workers: int, path: Path = RESULTS) -> Tally:
    """Run the seeds that the results do not hold yet, and write after every block."""
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    done = {tuple(span) for span in known.get("seeds", [])}
    found = Tally(known)
    blocks = [range(i, min(i + BLOCK, stop)) for i in range(first, stop, BLOCK)]
    left = [block for block in blocks if (block.start, block.stop) not in done]
    spawn, start = multiprocessing.get_context("spawn"), time.monotonic()
    with ProcessPoolExecutor(workers, mp_context=spawn, max_tasks_per_child=1) as pool:
        jobs = {pool.submit(_block, block): block for block in left}
        for number, job in enumerate(as_completed(jobs), 1):
            block = jobs[job]
            found.merge(job.result())
            done.add((block.start, block.stop))
            content = {"seeds": sorted(done), "torch": torch.__version__, **found.to_dict()}
            path.parent.mkdir(parents=True, exist_ok=True)
            path.with_suffix(".new").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
            path.with_suffix(".new").replace(path)
            rate = 3600 * number * BLOCK / (time.monotonic() - start)
            print(f"{found.networks} networks, {len(found.mismatches)} mismatches, {rate:.0f} an hour", flush=True)
    return found


def again(path: Path = RESULTS) -> Tally:
    """Repeat the mismatches with the code as it is now; the rest of the results stays."""
    known = json.loads(path.read_text(encoding="utf-8"))
    found = Tally(known)
    seeds = [entry["seed"] for entry in found.mismatches]
    found.networks -= len(seeds)
    found.mismatches = []
    found.merge(tally_of(seeds))
    path.write_text(json.dumps({**known, **found.to_dict()}, indent=1) + "\n", encoding="utf-8")
    return found


def _one(seed: int) -> int:
    """Show one network and what it comes to."""
    made = network(seed, add_feature)
    print(made.source, f"\n# input {made.shape}, features {made.features}\n")
    try:
        print(check(seed, made))
    except Exception:
        traceback.print_exc()
        return 1
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--from", dest="first", type=int, default=0)
    parser.add_argument("--to", dest="stop", type=int, default=10_000)
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) // 2))
    parser.add_argument("--seed", type=int, help="show this network only")
    parser.add_argument("--again", action="store_true", help="repeat the mismatches")
    parser.add_argument("--out", type=Path, default=RESULTS)
    asked = parser.parse_args(arguments)
    if asked.seed is not None:
        return _one(asked.seed)
    found = again(asked.out) if asked.again else sweep(asked.first, asked.stop, asked.workers, asked.out)
    for entry in found.mismatches:
        print(f"seed {entry['seed']}: {entry['found']}")
    for text in found.shortfalls():
        print(f"too little was shown: {text}")
    return int(bool(found.mismatches or found.shortfalls()))


if __name__ == "__main__":
    sys.exit(main())
