"""Quantised and sharded models: a boundary with the reason, or a refusal that says what to do first."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import linearize
from linearize.tensors import QUANTISE_LATER, oddity

X, *MORE = torch.randn(6, 64, 16, generator=torch.Generator().manual_seed(0)).unbind()


class Int8Linear(nn.Linear):
    """A weight in int8 that the forward scales: the parameter is no float tensor."""

    def __init__(self, like: nn.Linear) -> None:
        super().__init__(like.in_features, like.out_features)
        scale = like.weight.detach().abs().amax(1, keepdim=True) / 127
        self.weight = nn.Parameter((like.weight.detach() / scale).round().to(torch.int8), requires_grad=False)
        self.bias = like.bias
        self.register_buffer("scale", scale)

    def forward(self, input: Tensor) -> Tensor:
        weight = self.weight.to(input.dtype) * self.get_buffer("scale")
        return functional.linear(input, weight, self.bias)


class PackedLinear(nn.Module):
    """Two weights of four bits in a byte, under a name of its own, as other libraries keep them."""

    def __init__(self, like: nn.Linear) -> None:
        super().__init__()
        scale = like.weight.detach().abs().amax(1, keepdim=True) / 7
        whole = ((like.weight.detach() / scale).round() + 8).to(torch.uint8)
        self.register_buffer("qweight", (whole[:, ::2] << 4) | whole[:, 1::2])
        self.register_buffer("scale", scale)
        self.bias = like.bias

    def forward(self, x: Tensor) -> Tensor:
        packed = self.get_buffer("qweight")
        halves = ((packed >> 4).to(x.dtype) - 8, (packed & 15).to(x.dtype) - 8)
        return functional.linear(x, torch.stack(halves, -1).flatten(1) * self.get_buffer("scale"), self.bias)


def build() -> nn.Sequential:
    torch.manual_seed(0)
    parts = [nn.Linear(16, 48), nn.ReLU(), nn.Linear(48, 48), nn.GELU(), nn.Linear(48, 48), nn.SiLU()]
    return nn.Sequential(*parts, nn.Linear(48, 4)).eval()


@pytest.mark.parametrize("kind", [Int8Linear, PackedLinear])
def test_a_quantised_layer_is_a_boundary(kind: type[nn.Module]) -> None:
    model = build()
    model[2] = kind(model[2])
    with torch.no_grad():
        expected = model(X)
    gated = linearize.convert(model, X)
    reasons = {site.name: site.reason for site in linearize.summary(gated).sites}
    for name in ("1", "3"):
        assert reasons[name] is not None
        assert QUANTISE_LATER in str(reasons[name])
        assert "in 2, " in str(reasons[name])
    assert reasons["5"] is None  # the negative control: away from the quantised layer all is as ever
    with torch.no_grad():
        assert torch.equal(gated(X), expected)
    for gate in linearize.gates(gated).values():
        gate.linearize_(torch.arange(48) < 30)
    small = linearize.collapse(gated)
    assert linearize.verify(gated, small, X)
    assert type(small.get_submodule("2")) is kind
    result = linearize.compress(model, [X, *MORE], flops=0.8, rounds=0, progress=False, cache=False)
    assert QUANTISE_LATER in result.report.kept["1"]
    assert QUANTISE_LATER in str(result.report)
    assert result.plan["5"].form != "unchanged"


@pytest.mark.slow
def test_torchao() -> None:
    quantization = pytest.importorskip("torchao.quantization")
    config = quantization.Int8WeightOnlyConfig()
    model = build()
    quantization.quantize_(model, config, filter_fn=lambda module, name: name == "2")
    assert str(oddity(model[2].get_parameter("weight"))).startswith("quantised")
    with torch.no_grad():
        expected = model(X)
    gated = linearize.convert(model, X)
    sites = {site.name: site for site in linearize.summary(gated).sites}
    assert QUANTISE_LATER in str(sites["1"].reason)
    assert QUANTISE_LATER in str(sites["3"].reason)
    assert sites["5"].reason is None
    assert sites["5"].gated
    with torch.no_grad():
        assert torch.equal(gated(X), expected)
        assert torch.equal(model(X), expected)
    linearize.gates(gated)["5"].linearize_(torch.arange(48) < 40)
    small = linearize.collapse(gated)
    assert linearize.verify(gated, small, X)
    result = linearize.compress(model, [X, *MORE], flops=0.8, rounds=0, progress=False, cache=False)
    assert QUANTISE_LATER in result.report.kept["1"]
    with pytest.raises(linearize.CheckpointError, match=r"2\.weight"):
        linearize.save(result.model, "never.safetensors")
    whole = build()
    quantization.quantize_(whole, config)
    with pytest.raises(linearize.ConvertError, match=QUANTISE_LATER):
        linearize.convert(whole, X)
    small = linearize.compress(build(), [X, *MORE], flops=0.6, rounds=0, progress=False, cache=False).model
    quantization.quantize_(small, config)  # the order that the message asks for
    assert small(X).isfinite().all()


@pytest.fixture
def quantization() -> Iterator[object]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield pytest.importorskip("torch.ao.quantization")


def test_quantised_by_torch(quantization: object) -> None:
    tools: object = quantization
    dynamic = tools.quantize_dynamic(build(), {nn.Linear})  # type: ignore[attr-defined]
    with pytest.raises(linearize.ConvertError, match=QUANTISE_LATER):
        linearize.convert(dynamic, X)
    parts = [nn.ReLU() if isinstance(part, nn.GELU | nn.SiLU) else part for part in build()]
    static = nn.Sequential(tools.QuantStub(), *parts, tools.DeQuantStub()).eval()  # type: ignore[attr-defined]
    static.qconfig = tools.get_default_qconfig("x86")  # type: ignore[attr-defined]
    prepared = tools.prepare(static)  # type: ignore[attr-defined]
    prepared(X)
    finished = tools.convert(prepared)  # type: ignore[attr-defined]
    with torch.no_grad():
        expected = finished(X)
    with pytest.raises(linearize.LinearizeError, match=f"(?i){QUANTISE_LATER}"):
        linearize.compress(finished, [X, *MORE], flops=0.7, rounds=0, progress=False, cache=False)
    assert torch.equal(finished(X), expected)


def test_sharded() -> None:
    distributed = torch.distributed
    if not distributed.is_available():
        pytest.skip("torch without torch.distributed")
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    store = distributed.HashStore()  # type: ignore[attr-defined]
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model, mesh = build(), init_device_mesh("cpu", (1,))
        layer: nn.Module = model[0]
        for name, parameter in list(layer.named_parameters()):
            setattr(layer, name, nn.Parameter(distribute_tensor(parameter.detach(), mesh, [Shard(0)])))
        for call in (
            lambda: linearize.convert(model, X),
            lambda: linearize.compress(model, [X, *MORE], flops=0.7, rounds=0, progress=False, cache=False),
        ):
            with pytest.raises(linearize.UsageError, match=r"0.weight: is sharded over processes.*whole_state"):
                call()
    finally:
        distributed.destroy_process_group()


def test_which_tensors_are_odd() -> None:
    sparse = torch.eye(3).to_sparse()
    nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged)
    assert oddity(nn.Parameter(torch.ones(2))) is None
    assert oddity(torch.ones(2, dtype=torch.complex64)) is None
    assert oddity(torch.ones(2, device="meta")) is None
    assert oddity(sparse) == "sparse (torch.sparse_coo)"
    assert oddity(nested) == "a nested tensor"
