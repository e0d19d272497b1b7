"""Hostile files, plans and tables by the thousand: what comes of them, counted.

Run: python -m benchmarks.stress.files [--files 10000] [--plans 1000] [--caches 1000] [--seed 0]

Each case is made from its number, tried in another process (one for many cases, with a limit on its memory and 10 s of
the processor for a case), and watched: no code, no network, no questions, nothing opened but the file itself and the
installed libraries, no error but ours. The program goes on where it stopped; `--again` starts afresh.
"""

from __future__ import annotations

import argparse
import json
import resource
import select
import subprocess
import sys
import tempfile
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

from linearize.report.timing import write_json

RESULTS = Path(__file__).parent / "results" / "files.json"
ROOT = Path(__file__).resolve().parents[2]
_MEMORY = 24 * 2**30  # of addresses: torch alone maps some gigabytes
_KEPT = 20  # examples of what went wrong
_EVERY = 250


def serve(seed: int) -> None:
    """Try the cases whose kinds and numbers come in on standard input; a line of JSON for each goes out."""
    from benchmarks.stress.file_cases import Cases

    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    answer = sys.stdout
    sys.stdout = sys.stderr
    with tempfile.TemporaryDirectory() as folder:
        cases = Cases(Path(folder), seed)
        print(json.dumps({"ready": True}), file=answer, flush=True)
        for line in sys.stdin:
            kind, number = line.split()
            print(json.dumps(cases.run(kind, int(number))), file=answer, flush=True)


class Worker:
    """A process that tries cases; a new one if it dies."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.process: subprocess.Popen[str] | None = None

    def ask(self, kind: str, number: int) -> dict[str, Any]:
        """What came of a case."""
        if self.process is None:
            command = [
                sys.executable,
                "-W",
                "ignore",
                "-m",
                "benchmarks.stress.files",
                "--serve",
                "--seed",
                str(self.seed),
            ]
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=ROOT
            )
            self._answer(300)
        if self.process is not None and self.process.stdin is not None:
            self.process.stdin.write(f"{kind} {number}\n")
            self.process.stdin.flush()
        return self._answer(120)

    def _answer(self, seconds: float) -> dict[str, Any]:
        process = self.process
        if process is None or process.stdout is None:
            return {"outcome": "killed"}
        ready, _, _ = select.select([process.stdout], [], [], seconds)
        line = process.stdout.readline() if ready else ""
        if not line:
            self.close()
            return {"outcome": "killed" if ready else "hang"}  # a mistake of this program ends here, too: none may be
        found: dict[str, Any] = json.loads(line)
        return found

    def close(self) -> None:
        """End the process."""
        if self.process is not None:
            self.process.kill()
            with suppress(OSError):  # what was asked and not read
                self.process.communicate()
            self.process = None


class Tally:
    """Counts of outcomes, and examples of what went wrong; plain data in a file."""

    def __init__(self, path: Path, seed: int, *, again: bool) -> None:
        self.path = path
        held = json.loads(path.read_text(encoding="utf-8")) if path.is_file() and not again else {}
        if held.get("seed") != seed:
            held = {"seed": seed, "done": {}, "outcomes": {}, "watched": {}, "bad": []}
        self.data: dict[str, Any] = held

    def add(self, kind: str, number: int, found: dict[str, Any]) -> None:
        """Count a case."""
        data = self.data
        data["done"][kind] = number + 1
        counts = Counter(data["outcomes"].setdefault(kind, {}))
        counts[found["outcome"]] += 1
        data["outcomes"][kind] = dict(sorted(counts.items()))
        watched = data["watched"]
        for name in ("code", "network", "prompts", "reads"):
            watched[name] = watched.get(name, 0) + bool(found.get("seen", {}).get(name))
        allowed = 2**30 + 2 * found.get("size", 0)
        memory = found.get("memory", 0)
        watched["foreign"] = watched.get("foreign", 0) + (found["outcome"] == "foreign")
        watched["hang"] = watched.get("hang", 0) + (found["outcome"] in ("hang", "killed"))
        watched["too much memory"] = watched.get("too much memory", 0) + (memory > allowed)
        watched["largest memory, MB"] = max(watched.get("largest memory, MB", 0), round(memory / 1e6))
        watched["longest, s of the processor"] = max(
            watched.get("longest, s of the processor", 0), round(found.get("seconds", 0), 2)
        )
        worst = found["outcome"] in ("foreign", "hang", "killed") or found.get("seen") or memory > allowed
        odd = found["outcome"].startswith(("loads, fails", "the same function, another"))
        if (worst or odd) and sum(entry["outcome"] == found["outcome"] for entry in data["bad"]) < _KEPT:
            told = {key: value for key, value in found.items() if key not in ("seconds", "size")}
            data["bad"].append({"case": f"{kind} {number}", **told})

    def save(self) -> None:
        """Write what is known so far."""
        self.path.parent.mkdir(exist_ok=True)
        write_json(self.path, self.data)


def sweep(wanted: dict[str, int], seed: int, path: Path, *, again: bool = False) -> dict[str, Any]:
    """Try the cases that are not done yet, and give the counts."""
    tally, worker = Tally(path, seed, again=again), Worker(seed)
    try:
        for kind, count in wanted.items():
            for number in range(tally.data["done"].get(kind, 0), count):
                tally.add(kind, number, worker.ask(kind, number))
                if number % _EVERY == 0:
                    tally.save()
    finally:
        worker.close()
        tally.save()
    return tally.data


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=10_000)
    parser.add_argument("--plans", type=int, default=1000)
    parser.add_argument("--caches", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--again", action="store_true", help="forget what is known")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.serve:
        serve(asked.seed)
        return
    wanted = {"plan": asked.plans, "cache": asked.caches, "file": asked.files}
    found = sweep(wanted, asked.seed, asked.out, again=asked.again)
    print(json.dumps({key: found[key] for key in ("outcomes", "watched")}, indent=1))


if __name__ == "__main__":
    main()
