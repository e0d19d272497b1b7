"""ONNX: by torch's own exporter, run by ONNX Runtime."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from linearize.export.batches import batch_tensors
from linearize.export.compare import distance, expected
from linearize.export.face import RUNTIME_TOLERANCES, Means, Proof, Refusal, Subject
from linearize.export.plain import floating_types
from linearize.export.program import Program, program_of
from linearize.export.stepping import Stepping, decoded, stepping
from linearize.graph.capture import Inputs, silent
from linearize.report.verification import worst

__all__ = ["Onnx", "OrtSession", "version"]

_MOST = 2**31 - 2**20  # bytes in one protobuf message, with some room for what is no weight


class Onnx:
    """One .onnx file, with its weights beside it where they are too large for one."""

    name = "onnx"
    suffix = ".onnx"
    writes: Mapping[str, str] = {"onnx": "onnx", "onnxscript": "onnx"}
    runs: Mapping[str, str] = {"onnxruntime": "onnx"}
    means = Means()
    tolerances: Mapping[torch.dtype, float] = RUNTIME_TOLERANCES
    options: tuple[str, ...] = ("opset", "external_data", "cache")
    library = "onnxruntime"
    near: tuple[str, ...] = ("openvino", "pt2", "remote")
    fixed = False

    def can(self, model: nn.Module) -> Refusal | None:
        """Anything that torch.export captures, in types that the runtime's CPU kernels have."""
        wrong = [kind for kind in floating_types(model) if kind not in (torch.float32, torch.float16)]
        if wrong:
            where, kind = next((name, p.dtype) for name, p in model.named_parameters() if p.dtype == wrong[0])
            return Refusal(
                where, f"is of {kind}, for which ONNX Runtime has no kernels; model.float() makes a copy fit"
            )
        return None

    def write(self, subject: Subject, path: Path) -> Mapping[str, Any]:
        """Capture, translate, save."""
        subject = _asked(subject)
        program = program_of(subject)
        size = sum(t.numel() * t.element_size() for t in program.exported.state_dict.values())
        wanted = subject.options.get("external_data")
        made = _translated(program, subject.options.get("opset"))
        outside = size > _MOST if wanted is None else bool(wanted)
        made.save(path, external_data=outside)
        opset = {name or "ai.onnx": version for name, version in made.model.opset_imports.items()}
        return {
            "opset": opset["ai.onnx"],
            "inputs": ", ".join(program.inputs),
            "outputs": ", ".join(program.outputs),
            "open sizes": program.told,
            "external data": outside,
            **({"cache": "keys and values"} if isinstance(subject.model, Stepping) else {}),
        }

    def check(self, subject: Subject, path: Path) -> Proof:
        """Run the file in a session on the CPU."""
        subject, session = _asked(subject), OrtSession(path)

        def run(batch: Inputs) -> list[Tensor]:
            return [torch.from_numpy(output) for output in session.run(batch)()]

        batches = [batch for batch in subject.batches if session.fits(batch)]
        if not batches:  # the one that was traced fits, unless the exporter has lost an axis
            return Proof(version(), math.inf, 0)
        error = distance(expected(Subject(subject.model, batches)), [run(batch) for batch in batches])
        if not isinstance(subject.model, Stepping):
            return Proof(version(), error, len(batches))
        other, told = decoded(subject.model, subject.batches[1], run)
        return Proof(version(), worst([error, other]), len(batches), told)

    def usage(self, model: nn.Module) -> str:
        """A program that loads the file."""
        return "import onnxruntime\n\nsession = onnxruntime.InferenceSession('NAME')"


def _asked(subject: Subject) -> Subject:
    """The subject, or one step of it where a cache is asked for."""
    return stepping(subject) if subject.options.get("cache") else subject


def version() -> str:
    """Name and version of the runtime."""
    import onnxruntime

    return f"ONNX Runtime {onnxruntime.__version__}"


class OrtSession:
    """A file in ONNX Runtime, on the CPU, with as many threads as torch has. Its inputs are taken in order."""

    def __init__(self, path: Path) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = torch.get_num_threads()
        self.session: Any = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self.shapes = {entry.name: list(entry.shape) for entry in self.session.get_inputs()}

    def fits(self, batch: Inputs) -> bool:
        """Whether a batch has the sizes that are fixed."""
        tensors = batch_tensors(batch)
        return len(tensors) == len(self.shapes) and all(
            not isinstance(size, int) or size == have
            for shape, tensor in zip(self.shapes.values(), tensors, strict=True)
            for size, have in zip(shape, tensor.shape, strict=True)
        )

    def run(self, batch: Inputs) -> Callable[[], Any]:
        """A function without arguments that runs the file once on the batch."""
        arrays = [t.detach().cpu().contiguous().numpy() for t in batch_tensors(batch)]
        return partial(self.session.run, None, dict(zip(self.shapes, arrays, strict=True)))


def _translated(program: Program, opset: int | None) -> Any:
    """The ONNX program, its open sizes named in plain words."""
    with warnings.catch_warnings(), silent():
        warnings.simplefilter("ignore")
        made: Any = torch.onnx.export(
            program.exported,
            dynamo=True,
            input_names=list(program.inputs),
            output_names=list(program.outputs),
            opset_version=opset,
            verbose=False,
        )
    names: dict[str, str] = {}
    for value, axes in zip(made.model.graph.inputs, program.open, strict=True):
        names |= {str(value.shape[axis]): name for axis, name in axes.items()}
    _rename(made.model.graph, names)
    return made


def _rename(graph: Any, names: Mapping[str, str]) -> None:
    import onnx_ir

    def said(size: Any) -> Any:
        """Sums of sizes, too."""
        return size if isinstance(size, int) else re.sub(r"\w+", lambda word: names.get(word[0], word[0]), str(size))

    values = [*graph.inputs, *graph.outputs, *(value for node in graph for value in node.outputs)]
    for value in {id(value): value for value in values}.values():
        if any(not isinstance(size, int) for size in value.shape or ()):
            value.shape = onnx_ir.Shape([said(size) for size in value.shape])
