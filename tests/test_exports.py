"""The public names, and what importing them costs."""

from __future__ import annotations

import subprocess
import sys

import pytest

import linearize


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)


def test_names_are_sorted_and_there() -> None:
    assert linearize.__all__ == sorted(linearize.__all__)
    assert all(hasattr(linearize, name) for name in linearize.__all__)


def test_every_public_name_says_what_it_is() -> None:
    assert [name for name in linearize.__all__ if not (getattr(linearize, name).__doc__ or "").strip()] == []


def test_import_is_silent_and_pulls_in_no_optional_library() -> None:
    optional = (
        "timm",
        "transformers",
        "accelerate",
        "matplotlib",
        "sklearn",
        "torchvision",
        "PIL",
        "typer",
        "rich",
    )
    done = run(f"import sys, linearize; print(*[name for name in {optional!r} if name in sys.modules])")
    assert done.stdout.strip() == ""
    assert done.stderr == ""


@pytest.mark.slow
def test_import_costs_little_more_than_torch() -> None:
    code = (
        "import time; a = time.process_time(); import torch; b = time.process_time(); import linearize;"
        "print((time.process_time() - b) / (b - a))"
    )
    # Time of this process on the processor: waiting for a busy machine does not count. The least of three, as caches
    # that others empty can only make it look slower than it is.
    assert min(float(run(code).stdout) for _ in range(3)) < 0.3


def test_names_that_are_loaded_late_are_listed_before() -> None:
    done = run("import linearize; print(set(linearize.__all__) <= set(dir(linearize)))")
    assert done.stdout.strip() == "True"
