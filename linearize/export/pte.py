"""PTE: a program for ExecuTorch, whose matrices and convolutions run in XNNPACK."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from linearize.errors import ExportError
from linearize.export.batches import batch_tensors
from linearize.export.compare import distance, expected
from linearize.export.face import RUNTIME_TOLERANCES, Means, Proof, Refusal, Subject
from linearize.export.plain import floating_types
from linearize.export.program import program_of
from linearize.graph.capture import silent

__all__ = ["Pte"]


class Pte:
    """One .pte file, for inputs of the sizes of the example."""

    name = "pte"
    suffix = ".pte"
    writes: Mapping[str, str] = {"executorch": "executorch"}
    runs: Mapping[str, str] = {"executorch": "executorch"}
    means = Means()
    tolerances: Mapping[torch.dtype, float] = RUNTIME_TOLERANCES
    options: tuple[str, ...] = ()
    library = "executorch"
    near: tuple[str, ...] = ("onnx", "openvino", "pt2")
    fixed = True

    def can(self, model: nn.Module) -> Refusal | None:
        """Anything that torch.export captures, in float32."""
        wrong = [kind for kind in floating_types(model) if kind != torch.float32]
        if wrong:
            where = next(name for name, p in model.named_parameters() if p.dtype == wrong[0])
            return Refusal(where, f"is of {wrong[0]}, and XNNPACK computes in float32; model.float() makes a copy fit")
        return None

    def write(self, subject: Subject, path: Path) -> Mapping[str, Any]:
        """Capture, hand over to XNNPACK what it takes, save."""
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.exir import to_edge_transform_and_lower

        count = len(batch_tensors(subject.batches[0]))
        program = program_of(Subject(subject.model, subject.batches, axes=({},) * count))
        try:
            with warnings.catch_warnings(), silent():
                warnings.simplefilter("ignore")
                edge = to_edge_transform_and_lower(program.exported, partitioner=[XnnpackPartitioner()])
                made = edge.to_executorch()
        except Exception as error:  # whatever the lowering raises
            line = next((text.strip() for text in str(error).splitlines() if text.strip()), type(error).__name__)
            raise ExportError("format pte", f"ExecuTorch cannot take it ({line[:300]})", "Use onnx.") from error
        path.write_bytes(made.buffer)
        shapes = [list(tensor.shape) for tensor in batch_tensors(subject.batches[0])]
        sizes = [f"{name} {shape}" for name, shape in zip(program.inputs, shapes, strict=True)]
        return {"inputs": ", ".join(sizes), "outputs": ", ".join(program.outputs), **_places(edge)}

    def check(self, subject: Subject, path: Path) -> Proof:
        """Run by ExecuTorch's own runtime, in this process."""
        import importlib.metadata

        from executorch.runtime import Runtime

        with silent():
            method = Runtime.get().load_program(str(path)).load_method("forward")
            found = []
            for batch in subject.batches:
                outputs = method.execute([t.detach().cpu().contiguous() for t in batch_tensors(batch)])
                found.append([output.clone() for output in outputs])
        version = importlib.metadata.version("executorch")
        return Proof(f"ExecuTorch {version}", distance(expected(subject), found), len(found))

    def usage(self, model: nn.Module) -> str:
        """A program that loads the file."""
        load = "method = Runtime.get().load_program('NAME').load_method('forward')"
        return f"from executorch.runtime import Runtime\n\n{load}"


def _places(edge: Any) -> dict[str, str]:
    """How many parts run in XNNPACK, and which operations outside: these are what makes a file slow."""
    calls = [node.target for node in edge.exported_program().graph.nodes if node.op == "call_function"]
    names = [str(getattr(target, "__name__", target)) for target in calls if target is not operator.getitem]
    inside = sum("call_delegate" in name for name in names)
    outside = sorted(name for name in names if "call_delegate" not in name)
    kinds = sorted({name.removeprefix("aten.").partition(".")[0] for name in outside})
    told = f"{len(outside)} operations" + (f" ({', '.join(kinds)})" if kinds else "")
    return {"parts in XNNPACK": str(inside), "outside": told}
