"""Faults put in by hand, one line each, and whether the tests catch them.

    python -m benchmarks.stress.mutants            # all that have no result yet; an hour
    python -m benchmarks.stress.mutants --only 3   # one of them

Each fault is made in a copy of the library, the tests of that room run there, and a fault is caught when one fails. The
table is written to benchmarks/stress/results/mutants.json.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path

import matplotlib.figure  # noqa: F401 - loaded once, before the forks, as the next three are
import pytest
import timm  # noqa: F401
import torch.export  # noqa: F401
import transformers  # noqa: F401

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).parent / "results" / "mutants.json"


@dataclass(frozen=True)
class Mutant:
    """A fault: `old` occurs once in `file` (below linearize/) and becomes `new`; `tests` are those of its room."""

    file: str
    old: str
    new: str
    tests: tuple[str, ...]


# What is loaded before the fork cannot have its assertions rewritten, and needs not.
OPTIONS = ("-p", "no:cacheprovider", "-W", "ignore::pytest.PytestAssertRewriteWarning")
ALGEBRA = ("test_algebra.py", "test_layers.py", "test_survivors.py")
FORMS = ("test_equivalence.py", "test_algebra.py", "test_survivors.py")
CALIBRATE = ("test_calibrate.py", "test_survivors.py")
LOSSES = ("test_finetune.py",)
WALKS = ("test_survivors.py", "test_channels.py", "test_bad_input.py", "test_equivalence.py")
FILES = ("test_survivors.py", "test_checkpoint.py")
CONTROL = "class LinearizeError("
MUTANTS: tuple[Mutant, ...] = (
    # algebra
    Mutant("algebra/affine.py", "bias=affine.bias * scale + shift", "bias=affine.bias + shift", ALGEBRA),
    Mutant("algebra/affine.py", "stride = tuple(a * b for", "stride = tuple(a + b - 1 for", ALGEBRA),
    Mutant("algebra/affine.py", "tuple(p + s * q for", "tuple(p + q for", ALGEBRA),
    Mutant("algebra/affine.py", "steps = tuple(d * s for", "steps = tuple(d for", ALGEBRA),
    Mutant(
        "algebra/affine.py", "if outer.padded and not inner.pointwise:", "if outer.padded and inner.padded:", ALGEBRA
    ),
    Mutant("algebra/affine.py", "padding.append(total // 2)", "padding.append(total - total // 2 - 1)", ALGEBRA),
    Mutant("algebra/affine.py", "outer.same or inner.same)", "outer.same)", ALGEBRA),
    Mutant("algebra/affine.py", "torch.sqrt(var.double() + eps)", "torch.sqrt(var.double() + 1e-5)", ALGEBRA),
    Mutant("algebra/moments.py", "weight = old * count / total", "weight = old / total", CALIBRATE),
    Mutant("algebra/moments.py", "+ xh + weight * dx * dh", "+ xh", CALIBRATE),
    Mutant("algebra/moments.py", "flat = self.xx <= count *", "flat = self.xx < 0 * count *", CALIBRATE),
    # forms
    Mutant("algebra/forms.py", "maps.intercept[maps.dropped]", "maps.slope[maps.dropped]", FORMS),
    Mutant("algebra/forms.py", "if maps.steady:  # the bias", "if True:  # the bias", FORMS),
    Mutant("algebra/forms.py", "ones = not maps.constant_bias", "ones = False", FORMS),
    Mutant("algebra/forms.py", "merged = replace(merged, bias=consumer.bias)", "pass", FORMS),
    Mutant("algebra/forms.py", "    if maps.grouped:\n", "    if False:\n", FORMS),
    Mutant(
        "surgery/narrow.py",
        "constant & (lower.intercept == 0).cpu()",
        "constant",
        ("test_survivors.py", "test_narrow.py"),
    ),
    # losses
    Mutant("training/divergence.py", ".sum(-1).mean() * temperature**2", ".sum(-1).mean()", LOSSES),
    Mutant("training/losses.py", "classes, ignore_index=IGNORED)", "classes.clamp(min=0))", LOSSES),
    Mutant("training/divergence.py", "teacher.square().mean().clamp(min=1e-12)", "student.square().mean()", LOSSES),
    Mutant("training/priors.py", "math.floor(goal + 0.5)", "math.floor(goal)", ("test_prior.py",)),
    # walks
    Mutant(
        "graph/walk.py", "if len(users(node)) > 1 and not packed:", "if len(users(node)) > 9 and not packed:", WALKS
    ),
    Mutant("graph/walk.py", "elif not motion.steady:", "elif False:", WALKS),
    Mutant("graph/walk.py", "tuple(reversed(folds))", "tuple(folds)", WALKS),
    Mutant("graph/walk.py", "start=rows[0], stop=rows[1])", "start=rows[0], stop=port.stop)", WALKS),
    # storage and checks
    Mutant("storage/tensorfile.py", "if end - start != math.prod(shape)", "if end - start < math.prod(shape)", FILES),
    Mutant("storage/tensorfile.py", "    if reach > room:", "    if reach > room + 2**20:", FILES),
    Mutant("storage/atomic.py", "                beside.unlink()\n", "                pass\n", FILES),
    Mutant(
        "verify.py", "return 0.0 if difference == 0 else", "return 0.0 if difference >= 0 else", ("test_verify.py",)
    ),
    # tests that could not fail before: latency below reach, pictures, times
    Mutant(
        "planning/settle.py",
        "if not best.met and best.reached > 1:",
        "if False:",
        ("test_survivors.py", "test_compress_input.py"),
    ),
    Mutant("bench.py", "(time.perf_counter() - start) / number", "time.perf_counter() - start", ("test_bench.py",)),
    Mutant("analysis/paths.py", "axes.axvline(found.mean,", "axes.axvline(0,", ("test_analysis_charts.py",)),
    Mutant("analysis/core.py", '100 * row["share"]', 'row["share"]', ("test_analysis_core.py",)),
    Mutant("report/pictures.py", "axes.bar(places, shares,", "axes.bar(places, shares[::-1],", ("test_compress.py",)),
)


def outcome_of(mutant: Mutant) -> dict[str, object]:
    """Run the tests of a mutant's room on a copy that holds the fault."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for name in ("linearize", "tests", "benchmarks", "docs"):
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("conftest.py", "pyproject.toml", "README.md"):
            shutil.copy(ROOT / name, copy / name)
        file = copy / "linearize" / mutant.file
        text = file.read_text(encoding="utf-8")
        if text.count(mutant.old) != 1:
            raise ValueError(f"{mutant.file}: {mutant.old!r} occurs {text.count(mutant.old)} times")
        file.write_text(text.replace(mutant.old, mutant.new), encoding="utf-8")
        start = time.monotonic()
        child = multiprocessing.get_context("fork").Process(target=_tested, args=(copy, mutant.tests))
        child.start()
        child.join()
        said = (copy / "said").read_text(encoding="utf-8")
    failed = [line for line in said.splitlines() if line.startswith(("FAILED", "ERROR"))]
    by = failed[0].split(" - ")[0] if failed else ""
    if child.exitcode != (1 if by else 0):  # the tests did not even run
        raise RuntimeError(f"exit status {child.exitcode}: {said[-2000:]}")
    return {**asdict(mutant), "caught": bool(by), "by": by, "seconds": round(time.monotonic() - start)}


def _tested(copy: Path, tests: Sequence[str]) -> None:
    """Run tests in a copy of the project, in a process forked from one that has the large libraries loaded."""
    os.chdir(copy)
    sys.path[:] = [str(copy), *(place for place in sys.path if place and Path(place).resolve() != ROOT)]
    with (copy / "said").open("w", encoding="utf-8") as file, redirect_stdout(file):
        status = pytest.main([*(f"tests/{name}" for name in tests), "-q", "-x", "--tb=no", *OPTIONS])
    library = sys.modules["linearize"].__file__
    if library is None or not Path(library).is_relative_to(copy):
        raise RuntimeError(f"{library} was tested")
    sys.exit(int(status))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the command line asks for; the exit status is the number of faults that nobody noticed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", type=int)
    parser.add_argument("--out", type=Path, default=RESULTS)
    asked = parser.parse_args(arguments)
    known = json.loads(asked.out.read_text(encoding="utf-8"))["mutants"] if asked.out.exists() else []
    results = {(row["file"], row["old"], row["new"]): row for row in known if row["caught"]}  # survivors run again
    chosen = MUTANTS if asked.only is None else MUTANTS[asked.only : asked.only + 1]
    control = outcome_of(Mutant("errors.py", CONTROL, CONTROL, ("test_calibrate.py",)))
    if control["caught"]:  # no fault: the tests must pass
        raise RuntimeError(f"without a fault, {control['by']}")
    for mutant in chosen:
        key = (mutant.file, mutant.old, mutant.new)
        if key not in results:
            results[key] = outcome_of(mutant)
            print(f"{'caught' if results[key]['caught'] else 'SURVIVED'}: {mutant.file}: {mutant.new}", flush=True)
        rows = [results[k] for m in MUTANTS if (k := (m.file, m.old, m.new)) in results]
        content = {"caught": sum(bool(row["caught"]) for row in rows), "of": len(rows), "mutants": rows}
        asked.out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return sum(not row["caught"] for row in results.values())


if __name__ == "__main__":
    sys.exit(main())
