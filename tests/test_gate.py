"""The gate's value, its gradients, what it keeps for the backward pass, and its manners as a module."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from linearize.errors import UsageError
from linearize.gating import arithmetic
from linearize.gating.gate import ChannelGate, gates
from linearize.sites.site import Site

ACTIVATIONS = [
    nn.ReLU(),
    nn.ReLU(inplace=True),
    nn.ReLU6(),
    nn.GELU(),
    nn.GELU("tanh"),
    nn.SiLU(inplace=True),
    nn.Hardswish(),
    nn.Mish(),
    nn.Tanh(),
    nn.ELU(),
    nn.LeakyReLU(0.2),
    nn.Identity(),
]


def plain(gate: ChannelGate, x: Tensor) -> Tensor:
    """The formula as the issue writes it, in operations that autograd follows."""
    shape = (-1,) + (1,) * (-gate.axis - 1)
    a = torch.where(gate.frozen, 1.0, gate.alpha).view(shape)
    h = gate.activation(x)
    result: Tensor = h + a * (gate.slope.view(shape) * x + gate.intercept.view(shape) - h)
    return result


def random_gate(activation: nn.Module, channels: int, axis: int = -1, *, frozen: int = 2) -> ChannelGate:
    gate = ChannelGate(copy.deepcopy(activation), channels, axis)
    with torch.no_grad():
        gate.alpha.uniform_(0.1, 0.9)
        gate.slope.normal_()
        gate.intercept.normal_()
    return gate.linearize_(torch.arange(channels) < frozen)


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_alpha_zero_is_the_activation_bitwise(activation: nn.Module, dtype: torch.dtype) -> None:
    gate = ChannelGate(activation, 6, axis=-3)
    with torch.no_grad():
        gate.slope.normal_()
        gate.intercept.normal_()
    x = torch.randn(3, 6, 7, 5, dtype=dtype) * 5
    before = x.clone()
    expected = copy.deepcopy(activation)(x.clone())
    for mode in (gate.train(), gate.eval()):
        assert torch.equal(mode(x), expected)
        with torch.no_grad():
            assert torch.equal(mode(x), expected)
    assert torch.equal(x, before), "the activation worked in place"
    assert gate(x).dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_alpha_one_is_exactly_the_line(dtype: torch.dtype) -> None:
    gate = random_gate(nn.GELU(), 8, frozen=8).to(dtype)
    x = torch.randn(5, 8, dtype=dtype) * 1e4
    assert torch.equal(gate(x), torch.addcmul(gate.intercept, gate.slope, x))


def test_linear_channels_differ_from_the_activation() -> None:
    gate = random_gate(nn.ReLU(), 4)
    x = torch.randn(50, 4)
    assert not torch.allclose(gate(x)[:, :2], torch.relu(x)[:, :2], atol=0.1)


@pytest.mark.parametrize("activation", [*ACTIVATIONS, nn.PReLU(6), nn.PReLU()], ids=repr)
@pytest.mark.parametrize(("shape", "axis"), [((9, 6, 4, 5), -3), ((7, 6), -1), ((2, 6, 3), -2)])
@pytest.mark.parametrize("piece", [2**18, 50], ids=["whole", "pieces"])
def test_gradients_are_those_of_the_formula(
    activation: nn.Module, shape: tuple[int, ...], axis: int, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arithmetic, "_CPU_PIECE", piece)
    gate = random_gate(activation, 6, axis).double()
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(shape, dtype=torch.float64)
    inputs = [x, *gate.parameters()]
    value, expected = gate(x), plain(gate, x)
    torch.testing.assert_close(value, expected)
    found = torch.autograd.grad((value * weights).sum(), inputs)
    torch.testing.assert_close(found, torch.autograd.grad((expected * weights).sum(), inputs))
    assert torch.equal(found[1][:2], torch.zeros(2)), "a frozen channel's alpha gets no gradient"


def test_one_axis_only() -> None:
    gate = random_gate(nn.SiLU(), 6).double()
    assert torch.autograd.gradcheck(gate, torch.randn(6, dtype=torch.float64, requires_grad=True))


def test_empty_batch() -> None:
    gate, x = random_gate(nn.SiLU(), 6), torch.zeros(0, 6, requires_grad=True)
    gate(x).sum().backward()
    assert x.grad is not None
    assert gate(x).shape == (0, 6)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=5), st.data())
def test_any_shape_and_axis(shape: list[int], data: st.DataObject) -> None:
    axis = data.draw(st.integers(-len(shape), -1))
    gate = random_gate(nn.GELU(), shape[axis], axis, frozen=data.draw(st.integers(0, 2))).double()
    x = torch.randn(shape, dtype=torch.float64).transpose(0, -1).contiguous().transpose(0, -1).requires_grad_()
    torch.testing.assert_close(gate(x), plain(gate, x))
    found = torch.autograd.grad(gate(x).sin().sum(), [x, gate.alpha])
    torch.testing.assert_close(found, torch.autograd.grad(plain(gate, x).sin().sum(), [x, gate.alpha]))


def test_second_derivatives() -> None:
    gate = random_gate(nn.GELU(), 4).double()
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(gate, x)
    (slope,) = torch.autograd.grad(gate(x).sum(), x, create_graph=True)
    (of_alpha,) = torch.autograd.grad(slope.square().sum(), gate.alpha)
    assert torch.equal(of_alpha[:2], torch.zeros(2))
    assert (of_alpha[2:] != 0).all()


def test_saves_the_input_and_nothing_else() -> None:
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    gate = random_gate(nn.GELU(), 4)
    source = torch.randn(3, 4, requires_grad=True)
    x = source * 1
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        gate(x)
    parameters = {p.data_ptr() for p in gate.parameters()}
    assert [t.data_ptr() for t in saved if t.data_ptr() not in parameters] == [x.data_ptr()]


def test_compiles_in_one_graph() -> None:
    gate = random_gate(nn.GELU(), 4).double()
    compiled = torch.compile(gate, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(compiled(x), gate(x))
    found = torch.autograd.grad(compiled(x).sin().sum(), [x, gate.alpha])
    torch.testing.assert_close(found, torch.autograd.grad(gate(x).sin().sum(), [x, gate.alpha]))


def test_exports() -> None:
    gate, x = random_gate(nn.Hardswish(), 4), torch.randn(3, 4)
    program = torch.export.export(gate, (x,), strict=False)
    torch.testing.assert_close(program.module()(x), gate(x))


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:FutureWarning")  # by torch.func.jvp itself
def test_under_function_transforms() -> None:
    gate, x = random_gate(nn.GELU(), 4), torch.randn(5, 4)
    torch.testing.assert_close(torch.func.vmap(gate)(x), gate(x))
    jacobian = torch.func.vmap(torch.func.jacrev(gate))(x)
    expected = torch.autograd.functional.jacobian(lambda z: gate(z).sum(0), x).movedim(0, 1)
    torch.testing.assert_close(jacobian, expected)
    tangent = torch.func.jvp(gate, (x,), (torch.ones_like(x),))[1]
    torch.testing.assert_close(tangent, jacobian.sum(-1))
    with torch.autograd.forward_ad.dual_level():
        dual = gate(torch.autograd.forward_ad.make_dual(x, torch.ones_like(x)))
        torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(dual).tangent, tangent)


def test_autocast_keeps_alpha_in_float32() -> None:
    first, gate, last = nn.Linear(8, 16), random_gate(nn.GELU(), 16), nn.Linear(16, 2)
    model, wanted = nn.Sequential(first, gate, last), [gate.alpha, first.weight]
    x = torch.randn(64, 8)
    exact = torch.autograd.grad(model(x).square().mean(), wanted)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hidden = gate(first(x))
        loss = model(x).square().mean()
    assert hidden.dtype == torch.bfloat16
    found = torch.autograd.grad(loss, wanted)
    assert gate.alpha.dtype == found[0].dtype == torch.float32
    for rough, fine in zip(found, exact, strict=True):  # bfloat16 has 8 bits of precision
        torch.testing.assert_close(rough, fine, rtol=0.05, atol=0.02 * float(fine.abs().max()))


def test_the_sum_for_alpha_is_not_made_in_half_precision() -> None:
    gate = ChannelGate(nn.ReLU(), 2).bfloat16()
    x = -torch.ones(4096, 2, dtype=torch.bfloat16)
    gate(x).sum().backward()
    assert gate.alpha.grad is not None
    assert gate.alpha.grad.tolist() == [-4096, -4096]  # a running sum in bfloat16 stops at 256


@pytest.mark.parametrize("cast", [nn.Module.half, nn.Module.bfloat16, nn.Module.double, lambda m: m.to("meta")])
def test_casts_leave_the_mask_alone(cast: Any) -> None:
    gate = cast(random_gate(nn.GELU(), 4))
    assert gate.frozen.dtype == torch.bool
    x = torch.randn(3, 4, dtype=gate.alpha.dtype, device=gate.alpha.device)
    assert gate(x).dtype == gate.alpha.dtype
    assert gate(x).shape == x.shape


def test_copies_and_pickles() -> None:
    site = Site("act", "act", "gelu", channels=4, axis=-1, order=0, positions=2)
    gate = ChannelGate(nn.PReLU(4), 4, site=site)
    gate.linearize_(torch.tensor([True, False, True, False]))
    x = torch.randn(3, 4)
    for twin in (copy.deepcopy(gate), pickle.loads(pickle.dumps(gate))):  # noqa: S301 - our own bytes
        assert torch.equal(twin(x), gate(x))
        assert twin.site == site
        assert list(twin.state_dict()) == list(gate.state_dict())


def test_the_activation_keeps_its_names_in_the_state_dict() -> None:
    original = nn.Sequential(nn.Linear(3, 4), nn.PReLU(4))
    prelu = nn.PReLU(4)
    gated = nn.Sequential(nn.Linear(3, 4), ChannelGate(prelu, 4))
    assert set(original.state_dict()) | {f"1.{n}" for n in ("alpha", "slope", "intercept", "frozen")} == set(
        gated.state_dict()
    )
    nn.init.constant_(original[1].weight, 0.7)  # type: ignore[arg-type]
    missing, unexpected = gated.load_state_dict(original.state_dict(), strict=False)
    assert (len(missing), unexpected) == (4, [])
    assert prelu.weight.tolist() == pytest.approx([0.7] * 4)
    buffer = io.BytesIO()
    torch.save(gated.state_dict(), buffer)
    buffer.seek(0)
    gated.load_state_dict(torch.load(buffer, weights_only=True))


class Scaled(nn.Module):
    """An activation whose parameter has a name that the gate uses too."""

    def __init__(self) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.tensor(3.0))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x * self.alpha)


def test_an_activation_with_a_parameter_named_alpha() -> None:
    gate, twin = ChannelGate(Scaled(), 4), ChannelGate(Scaled(), 4)
    nn.init.constant_(gate.activation.alpha, 5.0)  # type: ignore[arg-type]
    nn.init.constant_(gate.alpha, 0.5)
    twin.load_state_dict(gate.state_dict())
    assert torch.equal(twin(torch.ones(4)), gate(torch.ones(4)))


def test_a_shared_inplace_activation_is_left_alone() -> None:
    shared = nn.ReLU(inplace=True)
    gate = ChannelGate(nn.Sequential(shared), 4)
    x = -torch.ones(2, 4)
    gate(x)
    assert torch.equal(x, -torch.ones(2, 4))
    assert shared.inplace


def test_hooks_on_the_activation_see_its_output() -> None:
    gate, x = random_gate(nn.GELU(), 4), torch.randn(3, 4, requires_grad=True)
    seen: list[Tensor] = []
    handle = gate.activation.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    gate(x).sum().backward()
    with torch.no_grad():
        value = gate(x)
    handle.remove()
    for output in seen:
        torch.testing.assert_close(output, nn.functional.gelu(x))
    assert len(seen) == 2, "the backward pass ran the hooks again"
    torch.testing.assert_close(value, gate(x))


def test_random_activations_draw_once() -> None:
    gate = ChannelGate(nn.RReLU(0.1, 0.9), 4).train()
    x = -torch.rand(200, 4, requires_grad=True) - 1
    y = gate(x)
    (slope,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(slope * x, y)


def test_activation_checkpointing() -> None:
    model = nn.Sequential(nn.Linear(4, 8), random_gate(nn.GELU(), 8), nn.Linear(8, 2))
    x = torch.randn(3, 4)
    expected = torch.autograd.grad(model(x).sum(), list(model.parameters()))
    found = torch.autograd.grad(checkpoint(model, x, use_reentrant=False).sum(), list(model.parameters()))
    torch.testing.assert_close(found, expected)


def test_linearize_and_linear() -> None:
    gate = ChannelGate(nn.ReLU(), 3)
    with torch.no_grad():
        gate.alpha[1] = 1
    assert gate.linear.tolist() == [False, True, False]
    assert gate.linearize_(torch.tensor([True, False, False])) is gate
    assert gate.frozen.tolist() == [True, False, False]
    assert gate.linear.tolist() == [True, True, False]
    with torch.no_grad():
        gate.alpha.zero_()
    assert gate.linear.tolist() == [True, False, False]
    assert gate(-torch.ones(3)).tolist() == [-1, 0, 0]


def test_gated_units_start_from_a_constant() -> None:
    gate = ChannelGate(nn.SiLU(), 2, gated_unit=True).linearize_(torch.tensor([True, False]))
    assert gate(torch.tensor([2.0, 0.0])).tolist() == [0, 0]


@pytest.mark.parametrize(
    "mask", [torch.zeros(2, dtype=torch.bool), torch.zeros(3), [True, False, True], torch.zeros(1, 3) > 0]
)
def test_bad_masks(mask: Any) -> None:
    with pytest.raises(UsageError, match=r"bool of shape \(3,\)"):
        ChannelGate(nn.ReLU(), 3).linearize_(mask)


@pytest.mark.parametrize(("channels", "axis"), [(0, -1), (3, 1), (3, 0)])
def test_bad_arguments(channels: int, axis: int) -> None:
    with pytest.raises(UsageError):
        ChannelGate(nn.ReLU(), channels, axis)


def test_gates_by_name_in_order_of_execution() -> None:
    def site(name: str, order: int) -> Site:
        return Site(name, name, "relu", channels=2, axis=-1, order=order, positions=1)

    model = nn.Module()
    model.late = ChannelGate(nn.ReLU(), 2, site=site("late", 1))
    model.early = ChannelGate(nn.ReLU(), 2, site=site("early", 0))
    assert list(gates(model)) == ["early", "late"]
    assert list(gates(nn.DataParallel(model))) == ["early", "late"]
    by_hand = nn.Sequential(nn.Linear(2, 2), ChannelGate(nn.ReLU(), 2))
    assert list(gates(by_hand)) == ["1"]
    assert list(gates(torch.compile(by_hand))) == ["1"]  # type: ignore[arg-type]
    assert gates(nn.Linear(2, 2)) == {}
    twice = nn.ModuleList([model, copy.deepcopy(model)])
    assert set(gates(twice)) == {"0.early", "0.late", "1.early", "1.late"}
