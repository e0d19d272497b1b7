"""Ways of running a forward pass: a model and a batch become a function without arguments that runs it once."""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from linearize.errors import LinearizeError, UsageError
from linearize.graph.capture import Inputs
from linearize.running.models import move

__all__ = ["LeftOut", "check_ways", "runner"]

_RUNTIMES = {"onnxruntime": ("onnxruntime", "onnxscript"), "openvino": ("openvino",)}
_EXTRAS = {"onnxruntime": "onnx", "openvino": "openvino"}
_WARM = 3  # runs before a graph is captured: libraries make their workspaces in the first ones


class LeftOut(Exception):
    """This model cannot be measured in this cell, for a reason that the results tell."""


def check_ways(ways: tuple[str, ...], place: torch.device) -> None:
    """Check that everything a suite asks for can run here, before anything is measured.

    Raises:
        UsageError: a way needs another device, or a runtime that is not installed.
    """
    for way in ways:
        missing = [name for name in _RUNTIMES.get(way, ()) if importlib.util.find_spec(name) is None]
        if missing:
            remedy = f'Install it: pip install "linearize[{_EXTRAS[way]}]".'
            raise UsageError(f"ways: {way}", f"{', '.join(missing)} is not installed", remedy)
        if way == "cudagraphs" and place.type != "cuda":
            raise UsageError("ways: cudagraphs", f"needs a CUDA device, found {place}", "Leave it out of ways.")
        if way == "openvino" and place.type != "cpu":
            raise UsageError("ways: openvino", f"runs on the CPU, found {place}", "Pass device: cpu, or leave it out.")
        if way == "onnxruntime" and place.type != "cpu":
            _check_provider(place)


def _check_provider(place: torch.device) -> None:
    import onnxruntime

    known = onnxruntime.get_available_providers()
    if place.type != "cuda" or "CUDAExecutionProvider" not in known:
        found = f"ONNX Runtime has no provider for {place}, only {', '.join(known)}"
        raise UsageError("ways: onnxruntime", found, "pip install onnxruntime-gpu, or leave it out of ways.")


def runner(way: str, model: nn.Module, batch: Inputs) -> Callable[[], Any]:
    """A function that runs a model on a batch once. Both are on their device, in their types, in eval mode.

    Raises:
        LeftOut: the model does not run in this way.
    """
    args, kwargs = batch
    try:
        if way == "eager":
            return partial(model, *args, **kwargs)
        if way == "compile":
            return partial(torch.compile(model), *args, **kwargs)
        if way == "cudagraphs":
            return _captured(partial(model, *args, **kwargs))
        return _exported(way, model, batch)
    except LinearizeError as error:
        raise LeftOut(str(error)) from error


def _captured(run: Callable[[], Any]) -> Callable[[], Any]:
    """All kernels of a call as one CUDA graph."""
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(_WARM):
            run()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def _exported(way: str, model: nn.Module, batch: Inputs) -> Callable[[], Any]:
    """The model in another runtime. Its file is gone when this returns: runtimes read it as a whole."""
    import copy

    from linearize.export.face import Subject
    from linearize.export.registry import format_of

    chosen = format_of({"onnxruntime": "onnx"}.get(way, way))
    refusal = chosen.can(model)
    if refusal is not None:
        raise LeftOut(f"{refusal.where} {refusal.why}")
    here = move(batch, torch.device("cpu"))
    still = model if _is_here(model) else copy.deepcopy(model).cpu()
    with tempfile.TemporaryDirectory(prefix="linearize-suite-", ignore_cleanup_errors=True) as folder:
        path = Path(folder) / f"model{chosen.suffix}"
        chosen.write(Subject(still, [here]), path)
        return (_in_onnxruntime if way == "onnxruntime" else _in_openvino)(path, batch)


def _is_here(model: nn.Module) -> bool:
    return all(tensor.device.type == "cpu" for tensor in (*model.parameters(), *model.buffers()))


def _in_onnxruntime(path: Path, batch: Inputs) -> Callable[[], Any]:
    """A session whose inputs stay where they are."""
    import onnxruntime

    from linearize.export.batches import batch_tensors

    tensors = [tensor.detach().contiguous() for tensor in batch_tensors(batch)]
    place = tensors[0].device
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    where, number = place.type, place.index or 0
    provider = ("CUDAExecutionProvider", {"device_id": number}) if where == "cuda" else "CPUExecutionProvider"
    session = onnxruntime.InferenceSession(str(path), options, providers=[provider])
    binding = session.io_binding()
    for entry, tensor in zip(session.get_inputs(), tensors, strict=True):
        kind = torch.empty(0, dtype=tensor.dtype).numpy().dtype
        binding.bind_input(entry.name, where, number, kind, list(tensor.shape), tensor.data_ptr())
    for entry in session.get_outputs():
        binding.bind_output(entry.name, where, number)

    def run() -> Any:
        session.run_with_iobinding(binding)
        return binding, tensors  # the session reads from them

    return run


def _in_openvino(path: Path, batch: Inputs) -> Callable[[], Any]:
    """The same session in which an export is proven and latencies are measured."""
    from linearize.export.batches import batch_tensors
    from linearize.export.openvino import OvSession

    strange = next((tensor.dtype for tensor in batch_tensors(batch) if tensor.dtype == torch.bfloat16), None)
    if strange is not None:
        raise LeftOut(f"OpenVINO takes no inputs of {strange} from Python")
    return OvSession(path).run(batch)
