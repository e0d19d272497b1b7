"""Every layer that may stand in a collapsed model, in the tools that people use on ordinary models."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from linearize.surgery import specs
from linearize.surgery.carriers import Around, roles_of
from linearize.surgery.specs import build, spec_of

FEATURES = (3, 8)
SIZES = {1: (7,), 2: (6, 7), 3: (4, 5, 6)}
# Types of files that are no layer of ours: stock, or not a layer at all. A skipped layer goes when a model collapses;
# a silent one gives zeros, of which there is nothing to differentiate or to quantise.
STOCK = {"Linear", "Conv1d", "Conv2d", "Conv3d", "Identity", "Children"}
NO_CARRIERS = {*STOCK, "ChannelGate", "Skipped", "Silent", *specs.IN_PLACE}


def linear(**more: Any) -> dict[str, Any]:
    return {"in_features": 8, "out_features": 5, "bias": True, **more}


def conv(n: int, **more: Any) -> dict[str, Any]:
    sizes = {"in_channels": 8, "out_channels": 5, "kernel_size": [1] * n, "stride": [1] * n, "padding": [0] * n}
    return {**sizes, "dilation": [1] * n, "groups": 1, "bias": True, **more}


def spatial(n: int, channels: int = 8) -> tuple[int, ...]:
    return (2, channels, *SIZES[n])


# Type in the file -> its numbers, and the shape of an input.
CASES: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "CarryLinear": (linear(start=0, whole=False), (3, 13)),
    "OnlyLinear": (linear(keyword="x", nones=0, caches=False), FEATURES),
    "OnesLinear": (linear(at=2, ones=3), FEATURES),
    "Ones": ({"width": 4}, FEATURES),
    "Elementwise": ({"function": "gelu", "options": {"approximate": "tanh"}}, FEATURES),
    "PartialActivation": ({"keep": 3, "axis": -1, "inplace": True}, FEATURES),
    "MaskedActivation": ({"channels": 8, "axis": -1}, FEATURES),
    "FoldedNorm": ({"channels": 8, "axis": -1, "shift": True}, FEATURES),
    "BlendedActivation": ({"channels": 8, "axis": -1}, FEATURES),
}
for n in (1, 2, 3):
    wide = {"kernel_size": [3] * n, "padding": [1] * n}
    CASES |= {
        f"CarryConv{n}d": (conv(n, start=0, whole=False, stride=[2] * n), spatial(n, 13)),
        f"InputCarryConv{n}d": (conv(n, ones=1, stride=[2] * n), spatial(n)),
        f"SameConv{n}d": (conv(n, kernel_size=[3] * n, stride=[2] * n), spatial(n)),
        f"BorderConv{n}d": (conv(n, **wide), spatial(n)),
        f"BorderSameConv{n}d": (conv(n, kernel_size=[3] * n, stride=[2] * n), spatial(n)),
        f"OnlyConv{n}d": (conv(n, keyword="x", nones=0), spatial(n)),
    }


def layer(name: str) -> tuple[nn.Sequential, Tensor]:
    """A model around the layer, with random numbers in it, and an input."""
    torch.manual_seed(0)
    options, shape = CASES[name]
    made = build({"type": name, **options}, nn.ReLU(inplace=True) if "inplace" in options else nn.GELU())
    for tensor in (*made.parameters(), *(b for b in made.buffers() if b.is_floating_point())):
        nn.init.uniform_(tensor, 0.1, 0.9)
    if hasattr(made, "linear") and isinstance(made.linear, Tensor):
        made.linear[::2] = True
    return nn.Sequential(made).eval(), torch.randn(shape)


def test_every_layer_is_here() -> None:
    assert CASES.keys() == specs._BUILDERS.keys() - NO_CARRIERS


@pytest.mark.parametrize("name", CASES)
def test_its_description_builds_it_again(name: str) -> None:
    made = layer(name)[0][0]
    spec = spec_of(made)
    assert spec == {"type": name, **CASES[name][0]}
    again = build(spec, nn.ReLU(inplace=True))
    assert [(key, value.shape) for key, value in again.state_dict().items()] == [
        (key, value.shape) for key, value in made.state_dict().items()
    ]


@pytest.mark.parametrize("name", CASES)
def test_no_layer_is_a_stock_layer_in_name_only(name: str) -> None:
    """What is a stock layer computes as one: a tool may put its own in the place of it."""
    stock = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    for module in layer(name)[0].modules():
        if isinstance(module, stock):
            assert type(module) in stock
            assert type(module).forward in [kind.forward for kind in stock]


@pytest.mark.parametrize("name", [name for name in CASES if "Conv" in name])
def test_one_sample_without_a_batch_axis(name: str) -> None:
    model, x = layer(name)
    model, x = model.double(), x.double()
    torch.testing.assert_close(model(x[0]), model(x)[0], rtol=1e-12, atol=1e-12)


def fx_traced(model: nn.Module, x: Tensor) -> Any:
    traced = torch.fx.symbolic_trace(model)
    traced.graph.eliminate_dead_code()
    traced.recompile()
    return traced


def traced(model: nn.Module, x: Tensor) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.trace(model, x)


def scripted(model: nn.Module, x: Tensor) -> Any:
    if any(type(module).__name__.startswith("Only") for module in model.modules()):
        pytest.skip("what it stands for takes arguments that TorchScript has no types for")
    if any(type(module).__name__ == "Elementwise" for module in model.modules()):
        pytest.skip("stands in rewritten forwards only, which have no source")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.script(model)


def compiled(model: nn.Module, x: Tensor) -> Any:
    torch.compiler.reset()
    return torch.compile(model, fullgraph=True, backend="eager")


TOOLS: dict[str, Callable[[nn.Module, Tensor], Any]] = {
    "fx.symbolic_trace": fx_traced,
    "jit.trace": traced,
    "jit.trace under no_grad": torch.no_grad()(traced),
    "jit.script": scripted,
    "export": lambda model, x: torch.export.export(model, (x,)).module(),
    "compile": compiled,
}


@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize("name", CASES)
def test_traced(name: str, tool: str) -> None:
    """The same values for the example and for another batch size, where the tool takes one; gradients, too."""
    model, x = layer(name)
    made = TOOLS[tool](model, x)
    inputs = [x] if tool == "export" else [x, torch.cat((x, x[:1]))]
    for given in inputs:
        a, b = (given.clone().requires_grad_() for _ in range(2))
        expected, found = model(a), made(b)
        assert torch.equal(b, given), "its input is not a tracer's to change"
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
        if name != "Ones":
            (left,), (right,) = torch.autograd.grad(expected.sum(), a), torch.autograd.grad(found.sum(), b)
            torch.testing.assert_close(right, left, rtol=1e-5, atol=1e-6)
        with torch.no_grad():
            torch.testing.assert_close(made(given.clone()), expected.detach(), rtol=1e-5, atol=1e-6)


def held(model: nn.Module) -> list[nn.Module]:
    """The ordinary layers inside."""
    return [m for m in model.modules() if type(m) in (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)]


MATRICES = [name for name in CASES if name.endswith("Linear")]
HELD = [name for name in CASES if name.endswith("Linear") or "Conv" in name]


def near(found: Tensor, expected: Tensor, tolerance: float) -> None:
    assert float((found - expected).norm() / expected.norm()) < tolerance


# Eight bits: half a step of 1/127 of the largest value, in weights and in inputs, summed over some terms.
EIGHT_BITS = 0.03
# One of each kind, for tools that take seconds for each.
FEW = [name for name in CASES if "1d" not in name and "3d" not in name]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", MATRICES)
def test_quantize_dynamic(name: str) -> None:
    from torch.ao.quantization import quantize_dynamic

    model, x = layer(name)
    made = quantize_dynamic(copy.deepcopy(model), {nn.Linear}, dtype=torch.qint8)
    assert not held(made), "nothing is left in float"
    near(made(x), model(x), EIGHT_BITS)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", FEW)
def test_quantize_fx(name: str) -> None:
    from torch.ao.quantization import get_default_qconfig_mapping, quantize_fx

    model, x = layer(name)
    prepared = quantize_fx.prepare_fx(copy.deepcopy(model), get_default_qconfig_mapping("x86"), (x,))
    prepared(x)
    made = quantize_fx.convert_fx(prepared)
    assert not held(made)
    near(made(x), model(x), 2 * EIGHT_BITS)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dynamic", [False, True], ids=["weight only", "dynamic"])
@pytest.mark.parametrize("name", MATRICES)
def test_torchao(name: str, dynamic: bool) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    model, x = layer(name)
    made = copy.deepcopy(model)
    config = "Int8DynamicActivationInt8WeightConfig" if dynamic else "Int8WeightOnlyConfig"
    quantization.quantize_(made, getattr(quantization, config)())
    weights = [type(module.weight) for module in made.modules() if isinstance(module, nn.Linear)]
    assert weights
    assert not {Tensor, nn.Parameter} & set(weights)
    near(made(x), model(x), EIGHT_BITS)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", HELD)
def test_peft(name: str) -> None:
    """LoRA on every layer inside: the same function at first, another after a step, and the same when merged."""
    peft = pytest.importorskip("peft")
    model, x = layer(name)
    expected = model(x)
    targets = [path for path, module in model.named_modules() if module in held(model)]
    made = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(r=2, target_modules=targets))
    torch.testing.assert_close(made(x), expected)
    made(x).square().sum().backward()
    adapted = [p for path, p in made.named_parameters() if "lora_B" in path]
    assert len(adapted) == len(targets)
    assert all(p.grad is not None and bool(p.grad.any()) for p in adapted)
    with torch.no_grad():
        for p in adapted:
            p.sub_(0.01 * p.grad)
    moved = made.eval()(x)
    assert not torch.allclose(moved, expected)
    if "Conv3d" in name:
        return  # PEFT itself cannot merge an ordinary Conv3d of kernel 1
    merged = made.merge_and_unload()
    torch.testing.assert_close(merged(x), moved, rtol=1e-4, atol=1e-4)
    assert type(merged[0]) is type(model[0])


@pytest.mark.parametrize("name", FEW)
def test_create_feature_extractor(name: str) -> None:
    extraction = pytest.importorskip("torchvision.models.feature_extraction")
    model, x = layer(name)
    whole = nn.Sequential(nn.Identity(), *model)
    made = extraction.create_feature_extractor(whole, {"1": "here"})
    torch.testing.assert_close(made(x)["here"], whole(x), rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", FEW)
def test_onnx(name: str) -> None:
    """Exported with a dynamic batch, run by the runtime itself."""
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    model, x = layer(name)
    batch = torch.export.Dim("batch", min=1, max=64)
    program: Any = torch.onnx.export(model, (x,), dynamo=True, dynamic_shapes=({0: batch},), verbose=False)
    session = runtime.InferenceSession(program.model_proto.SerializeToString(), providers=["CPUExecutionProvider"])
    for given in (x, torch.cat((x, x))):
        (found,) = session.run(None, {session.get_inputs()[0].name: given.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), model(given).detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", FEW)
def test_openvino(name: str) -> None:
    """Its own converter traces the module, twice, and compares the two graphs."""
    openvino = pytest.importorskip("openvino")
    model, x = layer(name)
    exact = {"INFERENCE_PRECISION_HINT": "f32"}  # else bfloat16, on processors that have it
    made = openvino.compile_model(openvino.convert_model(model, example_input=x), "CPU", exact)
    for given in (x, torch.cat((x, x))):
        found = torch.from_numpy(made(given.numpy())[0])
        torch.testing.assert_close(found, model(given).detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", HELD)
def test_weight_and_bias_can_be_read(name: str) -> None:
    """Forward code does so, and finds those of the layer inside."""
    made: Any = layer(name)[0][0]
    roles = roles_of(made)
    assert isinstance(made, Around)
    assert made.weight is roles["weight"][0].weight
    assert made.bias is roles["bias"][0].bias
