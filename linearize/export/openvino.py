"""OpenVINO: a saved intermediate representation, run on the CPU."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from linearize.export.batches import batch_tensors
from linearize.export.compare import distance, expected
from linearize.export.face import RUNTIME_TOLERANCES, Means, Proof, Refusal, Subject
from linearize.export.plain import floating_types
from linearize.export.program import Flat, input_names, output_names, program_of
from linearize.graph.capture import Inputs
from linearize.graph.protect import untouched

__all__ = ["OpenVino", "OvSession", "version"]


class OpenVino:
    """Two files: .xml for the graph, .bin for the weights."""

    name = "openvino"
    suffix = ".xml"
    writes: Mapping[str, str] = {"openvino": "openvino"}
    runs: Mapping[str, str] = {"openvino": "openvino"}
    means = Means()
    tolerances: Mapping[torch.dtype, float] = RUNTIME_TOLERANCES
    options: tuple[str, ...] = ()
    library = "openvino"
    near: tuple[str, ...] = ("onnx", "pt2", "remote")
    fixed = False

    def can(self, model: nn.Module) -> Refusal | None:
        """Anything that torch.export captures, in one floating type."""
        kinds = floating_types(model)
        if len(kinds) > 1:
            where = next(name for name, p in model.named_parameters() if p.dtype == kinds[1])
            return Refusal(
                where, f"is of {kinds[1]}, and others are of {kinds[0]}; OpenVINO does not mix them by itself"
            )
        return None

    def write(self, subject: Subject, path: Path) -> Mapping[str, Any]:
        """Capture, translate, save; weights as they are."""
        import openvino

        names = input_names(subject.model, subject.batches[0]), output_names(subject.model, subject.batches[0])
        made, told = _translated(subject)
        for ports, words in zip((made.inputs, made.outputs), names, strict=True):
            for port, name in zip(ports, words, strict=True):
                port.get_tensor().set_names({name})
        # Without this the weights are rounded to float16.
        openvino.save_model(made, str(path), compress_to_fp16=False)
        return {"inputs": ", ".join(names[0]), "outputs": ", ".join(names[1]), "open sizes": told}

    def check(self, subject: Subject, path: Path) -> Proof:
        """Compiled for the CPU, in float32: by itself it computes in bfloat16 where a processor has that."""
        session = OvSession(path)
        batches = [batch for batch in subject.batches if session.fits(batch)]
        found = []
        for batch in batches:
            outputs = session.run(batch)()
            found.append([torch.from_numpy(outputs[port].copy()) for port in session.made.outputs])
        reference = expected(Subject(subject.model, batches))
        return Proof(version(), distance(reference, found) if batches else float("inf"), len(batches))

    def usage(self, model: nn.Module) -> str:
        """A program that loads the file."""
        return "import openvino\n\nmodel = openvino.compile_model('NAME', 'CPU')"


def _translated(subject: Subject) -> tuple[Any, str]:
    """The model in OpenVINO's terms, and which sizes are open.

    By torch.export; by tracing where that has an op that is not known there: timm resizes its position embeddings when
    it is exported, and not when it is traced.
    """
    import openvino

    program = program_of(subject)
    with warnings.catch_warnings(), _quiet(), torch.no_grad():
        warnings.simplefilter("ignore")
        try:
            return openvino.convert_model(program.exported), program.told
        except openvino.frontend.OpConversionFailure as error:
            reason = str(error).strip().splitlines()[-1]
        tensors = batch_tensors(subject.batches[0])
        with untouched(subject.model):
            made = openvino.convert_model(Flat(subject.model, subject.batches[0]), example_input=tuple(tensors))
        sizes = [[-1 if axis in axes else size for axis, size in enumerate(t.shape)]
                 for t, axes in zip(tensors, program.open, strict=True)]  # fmt: skip
        made.reshape({port: openvino.PartialShape(shape) for port, shape in zip(made.inputs, sizes, strict=True)})
    return made, f"{program.told} (traced: {reason.removeprefix('-- ')})"


def version() -> str:
    """Name and version of the runtime."""
    import openvino

    return f"OpenVINO {openvino.__version__.partition('-')[0]}"


class OvSession:
    """A file in OpenVINO, on the CPU, in float32, with as many threads as torch has. Its inputs are taken in order."""

    def __init__(self, path: Path) -> None:
        import openvino

        settings = {
            "INFERENCE_PRECISION_HINT": "f32",
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "ENABLE_CPU_PINNING": False,  # a busy core would slow one of several models that are timed in turns
        }
        self.made: Any = openvino.Core().compile_model(str(path), "CPU", settings)

    def fits(self, batch: Inputs) -> bool:
        """Whether a batch has the sizes that are fixed."""
        import openvino

        ports, tensors = self.made.inputs, batch_tensors(batch)
        return len(ports) == len(tensors) and all(
            port.get_partial_shape().compatible(openvino.PartialShape(list(t.shape)))
            for port, t in zip(ports, tensors, strict=True)
        )

    def run(self, batch: Inputs) -> Callable[[], Any]:
        """A function without arguments that runs the file once on the batch; outputs last until the next call."""
        tensors = [t.detach().cpu().contiguous().numpy() for t in batch_tensors(batch)]
        request = self.made.create_infer_request()
        return partial(request.infer, tensors, share_inputs=True, share_outputs=True)


class _quiet:  # noqa: N801 - reads as a statement
    """The converter logs what it decides."""

    def __enter__(self) -> None:
        self.before = logging.root.manager.disable
        logging.disable(logging.WARNING)

    def __exit__(self, *_: object) -> None:
        logging.disable(self.before)
