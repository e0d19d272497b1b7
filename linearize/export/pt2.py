"""PT2: a package of compiled code and weights, which torch loads without the model's code."""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from linearize.errors import ExportError, UsageError
from linearize.export.compare import distance, expected
from linearize.export.face import RUNTIME_TOLERANCES, Means, Proof, Refusal, Subject
from linearize.export.process import outputs_elsewhere
from linearize.export.program import program_of
from linearize.graph.capture import silent
from linearize.running.models import device_of

__all__ = ["Pt2"]

_LOAD = """
model = torch._inductor.aoti_load_package(folder)

def run(args, kwargs):
    return model(*(t.to("{device}") for t in tensors([args, kwargs])))
"""


class Pt2:
    """One .pt2 file, compiled by AOTInductor for the device of the model, and for processors like this one."""

    name = "pt2"
    suffix = ".pt2"
    writes: Mapping[str, str] = {}
    runs: Mapping[str, str] = {}
    means = Means()
    tolerances: Mapping[torch.dtype, float] = RUNTIME_TOLERANCES
    options: tuple[str, ...] = ()
    library = "torch"
    near: tuple[str, ...] = ("onnx", "openvino", "remote")
    fixed = False

    def can(self, model: nn.Module) -> Refusal | None:
        """Anything that torch.export captures."""
        meta = next((name for name, p in model.named_parameters() if p.is_meta), None)
        return None if meta is None else Refusal(meta, "is on the meta device and has no values")

    def write(self, subject: Subject, path: Path) -> Mapping[str, Any]:
        """Capture and compile."""
        device = device_of(subject.model)
        compiler = os.environ.get("CXX", "g++")
        if device.type == "cpu" and shutil.which(compiler) is None:
            found = f"needs a C++ compiler, and {compiler} is not there"
            raise UsageError("format pt2", found, "Install g++, or set CXX to another one.")
        program = program_of(subject)
        compiled: Any = torch._inductor
        try:
            with warnings.catch_warnings(), silent():
                warnings.simplefilter("ignore")
                compiled.aoti_compile_and_package(program.exported, package_path=str(path))
        except Exception as error:  # whatever the compiler raises
            line = next((text.strip() for text in str(error).splitlines() if text.strip()), type(error).__name__)
            raise ExportError(
                "format pt2", f"it cannot be compiled ({line[:300]})", "Use onnx, or openvino."
            ) from error
        inputs, outputs = ", ".join(program.inputs), ", ".join(program.outputs)
        told = {"inputs": inputs, "outputs": outputs, "open sizes": program.told, "device": str(device)}
        return {**told, "torch": torch.__version__, **_instructions(device)}

    def check(self, subject: Subject, path: Path) -> Proof:
        """Loaded in a process that has torch, and neither the model's code nor linearize."""
        found = outputs_elsewhere(subject, path, _LOAD.format(device=device_of(subject.model)))
        return Proof(f"torch {torch.__version__} by itself", distance(expected(subject), found), len(found))

    def usage(self, model: nn.Module) -> str:
        """A program that loads the file."""
        return "import torch\n\nmodel = torch._inductor.aoti_load_package('NAME')"


def _instructions(device: torch.device) -> dict[str, str]:
    if device.type != "cpu":
        return {}
    return {"processors with": torch.backends.cpu.get_cpu_capability()}
