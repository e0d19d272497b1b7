"""Run code in a new process in which linearize cannot be imported: what a file's other reader sees."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from linearize.errors import ExportError
from linearize.export.batches import batch_tensors
from linearize.export.face import Subject
from linearize.graph.capture import Inputs
from linearize.nest import mapped

__all__ = ["outputs_elsewhere"]

_PROGRAM = """
import sys
sys.modules["linearize"] = None  # an import of it fails
import dataclasses
from collections.abc import Mapping
import torch
folder, place = sys.argv[1:]
torch.set_num_threads({threads})

def tensors(nest):
    if isinstance(nest, torch.Tensor):
        return [nest]
    if isinstance(nest, Mapping):
        return [t for value in nest.values() for t in tensors(value)]
    if isinstance(nest, (list, tuple)):
        return [t for value in nest for t in tensors(value)]
    if dataclasses.is_dataclass(nest):
        return [t for entry in dataclasses.fields(nest) for t in tensors(getattr(nest, entry.name))]
    return []

{load}
batches = torch.load(place + "/in.pt", weights_only=True)
with torch.no_grad():
    out = [[t.cpu().clone() for t in tensors(run(args, kwargs))] for args, kwargs in batches]
torch.save(out, place + "/out.pt")
"""


def outputs_elsewhere(subject: Subject, path: Path, load: str) -> list[list[Tensor]]:
    """The outputs, for each batch, of what a program makes of a file.

    Args:
        subject: for its batches.
        path: the file or folder.
        load: source that reads `folder` and defines `run(args, kwargs)`.

    Raises:
        ExportError: the program fails.
    """
    with tempfile.TemporaryDirectory() as place:
        torch.save([_plain(batch) for batch in subject.batches], f"{place}/in.pt")
        program = _PROGRAM.format(threads=torch.get_num_threads(), load=load)
        around = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": f"{place}/modules"}
        done = subprocess.run(  # noqa: S603 - this interpreter, with a program of ours
            [sys.executable, "-c", program, str(path.resolve()), place],
            capture_output=True, text=True, check=False, env=around, cwd=place,
        )  # fmt: skip
        if done.returncode:
            said = [line.strip() for line in done.stderr.splitlines() if line.strip()] or ["nothing"]
            found = f"a process without linearize cannot load it ({said[-1][:300]})"
            raise ExportError(str(path.name), found, "Please report this model.")
        found_: list[list[Tensor]] = torch.load(f"{place}/out.pt", weights_only=True)
    return found_


def _plain(batch: Inputs) -> Any:
    """On the CPU, in containers that a loader of weights takes."""
    assert batch_tensors(batch)  # noqa: S101 - of a subject
    return mapped(batch, lambda value: value.detach().cpu() if isinstance(value, Tensor) else value)
