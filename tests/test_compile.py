"""Gated and collapsed models under torch.compile, torch.export and autocast."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import linearize
from linearize.graph.capture import normalize_inputs, tensors_of
from tests.chain import error, outputs, randomize
from tests.toys import make

# One of each form and layer: merged, carried input, border, vanished, gated units, rewritten forwards, partial ones.
NAMES = [
    "mlp",
    "conv_strided_dilated",
    "pointwise_then_padded",
    "inverted_residual",
    "pooled_head",
    "two_consumers_and_dict_output",
    "tied_weights",
    "repeated_block",
    "shared_activation",
    "functional_activations",
    "gated_unit_by_keyword",
    "packed_unit",
    "same_padding",
]
SHARES = (0.5, 1.0)


def pair(name: str, share: float, dtype: torch.dtype = torch.float32) -> tuple[dict[str, nn.Module], Any]:
    """The gated and the collapsed model of a toy, and inputs."""
    model, inputs = make(name, dtype)
    gated = linearize.convert(model, inputs)
    randomize(gated, share)
    return {"gated": gated, "collapsed": linearize.collapse(gated, when="always")}, inputs


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("name", NAMES)
def test_one_graph(name: str, share: float) -> None:
    """fullgraph=True fails at any graph break."""
    models, inputs = pair(name, share)
    for model in models.values():
        expected = outputs(model, inputs)
        torch.compiler.reset()
        compiled: Any = torch.compile(model, fullgraph=True, backend="eager")
        assert error(expected, outputs(compiled, inputs)) <= 1e-6


@pytest.mark.parametrize("name", ["mlp", "gated_unit_by_keyword", "pointwise_then_padded"])
def test_training_step_in_one_graph(name: str) -> None:
    models, inputs = pair(name, 0.5, torch.float64)
    args, kwargs = normalize_inputs(inputs)
    for model in models.values():
        gradients = []
        for compiled in (False, True):
            torch.compiler.reset()
            model.train().zero_grad()
            forward: Any = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
            tensors_of(forward(*args, **kwargs))[0].square().sum().backward()
            gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        assert len(gradients[0]) == len(list(model.parameters()))
        assert error(*gradients) <= 1e-12


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor compiles C++, and there is no compiler")
@pytest.mark.slow
def test_inductor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A cache of its own: code that was compiled for another instruction set must not be found.
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    models, inputs = pair("mlp", 0.5)
    for model in models.values():
        expected = outputs(model, inputs)
        torch.compiler.reset()
        compiled: Any = torch.compile(model, fullgraph=True, backend="inductor")
        assert error(expected, outputs(compiled, inputs)) <= 1e-5


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("name", NAMES)
def test_export(name: str, share: float) -> None:
    models, inputs = pair(name, share)
    args, kwargs = normalize_inputs(inputs)
    for model in models.values():
        expected = outputs(model, inputs)
        program = torch.export.export(model, args, kwargs, strict=False)
        with torch.no_grad():
            found = tensors_of(program.module()(*args, **kwargs))
        assert error(expected, found) <= 1e-6


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("name", NAMES)
def test_autocast(name: str, share: float) -> None:
    """In bfloat16 both are about as far from the float32 function, and put out the same types."""
    models, inputs = pair(name, share)
    exact = outputs(models["gated"], inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = {kind: outputs(model, inputs) for kind, model in models.items()}
    assert [t.dtype for t in low["gated"]] == [t.dtype for t in low["collapsed"]]
    errors = {
        kind: error([t.to(f.dtype) for t, f in zip(exact, found, strict=True)], found) for kind, found in low.items()
    }
    assert errors["collapsed"] <= 4 * errors["gated"] + 8 * torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize("name", ["mlp", "conv_then_pointwise", "pointwise_then_padded"])
def test_dynamic_sizes(name: str) -> None:
    """One exported program for every batch size."""
    models, inputs = pair(name, 0.5)
    batch = torch.export.Dim("batch", min=2, max=64)
    other = torch.cat([inputs, inputs, inputs[:1]])
    for model in models.values():
        program = torch.export.export(model, (inputs,), dynamic_shapes=({0: batch},), strict=False)
        with torch.no_grad():
            assert error(outputs(model, other), tensors_of(program.module()(other))) <= 1e-6


@pytest.mark.filterwarnings("ignore")
@pytest.mark.slow
def test_onnx(tmp_path: Path) -> None:
    """Both programs compute in another runtime what the models compute here."""
    for library in ("onnx", "onnxscript"):
        pytest.importorskip(library, reason=f"{library} is not installed")
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    models, inputs = pair("mlp", 0.5)
    sizes = {}
    for kind, model in models.items():
        program = torch.onnx.export(model, (inputs,), dynamo=True, verbose=False)
        assert program is not None
        program.save(str(tmp_path / f"{kind}.onnx"))
        session = runtime.InferenceSession(str(tmp_path / f"{kind}.onnx"), providers=["CPUExecutionProvider"])
        found = session.run(None, {session.get_inputs()[0].name: inputs.numpy()})
        assert error(outputs(model, inputs), [torch.from_numpy(array) for array in found]) <= 1e-5
        weights: Any = program.model.graph.initializers
        sizes[kind] = sum(int(tensor.const_value.size) for tensor in weights.values())
    assert sizes["collapsed"] < sizes["gated"]


def test_a_module_that_was_compiled_before() -> None:
    """`module.compile()` keeps the module; the copy that gets the gates is not bound to the old code."""
    model, inputs = make("mlp")
    expected = outputs(model, inputs)
    torch.compiler.reset()
    model.compile(backend="eager")
    assert error(expected, outputs(model, inputs)) == 0
    gated = linearize.convert(model, inputs)
    assert error(expected, outputs(gated, inputs)) == 0
    randomize(gated, 0.5)
    moved = outputs(gated, inputs)
    assert error(expected, moved) > 1e-3
    assert error(moved, outputs(linearize.collapse(gated), inputs)) <= 1e-5
