"""Hidden symmetries: planted ones are found, bounds are sound, and reducing keeps the function where it says so."""

from __future__ import annotations

import copy
import json
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import linearize
from linearize.analysis import canonical, canonical_distance, hidden_symmetries, reduce, symmetry_table
from linearize.analysis.bounds import bounds
from linearize.analysis.intervals import Interval, box_of, input_shapes
from linearize.analysis.units import find_units
from linearize.graph.capture import capture, normalize_inputs
from linearize.surgery.layers import PartialActivation
from tests import toys
from tests.chain import error, outputs

EXACT = 1e-12


def planted(width: int = 8) -> nn.Sequential:
    """Fully connected, in float64: one channel inactive, one active, two parallel, one unread."""
    torch.manual_seed(1)
    net = nn.Sequential(
        OrderedDict(
            a=nn.Linear(3, width), act1=nn.ReLU(), b=nn.Linear(width, width), act2=nn.ReLU(), c=nn.Linear(width, 2)
        )
    ).double()
    with torch.no_grad():
        for layer, far in ((net.a, 3.0), (net.b, 30.0)):
            assert isinstance(layer, nn.Linear)
            layer.bias[0] = -far
            layer.bias[1] = far
            layer.weight[3], layer.bias[3] = 2.5 * layer.weight[2], 2.5 * layer.bias[2]
        assert isinstance(net.c, nn.Linear)
        net.c.weight[:, 4] = 0.0
    return net


def kinds(net: nn.Module, x: Any, **options: Any) -> dict[tuple[str, str, str], list[tuple[int, ...]]]:
    found: dict[tuple[str, str, str], list[tuple[int, ...]]] = {}
    for s in hidden_symmetries(net, x, **options):
        found.setdefault((s.site, s.kind, s.evidence), []).append(s.channels)
    return found


def uniform(sizes: tuple[int, ...], low: float = -1.0, high: float = 1.0) -> Tensor:
    return low + (high - low) * torch.rand(sizes, dtype=torch.float64)


def test_what_was_planted_is_found_on_the_data_and_in_the_box() -> None:
    net, x = planted(), uniform((400, 3))
    for evidence, options in (("data", {}), ("box", {"box": (-1, 1)})):
        found = kinds(net, x, **options)
        for site in ("act1", "act2"):
            assert 0 in found[site, "inactive", evidence][0]
            assert 1 in found[site, "active", evidence][0]
            assert (2, 3) in found[site, "parallel", evidence]
        assert found["act2", "unseen", evidence] == [(4,)]


@pytest.mark.parametrize("when", ["cheaper", "always"])
@pytest.mark.parametrize("box", [None, (-1, 1)])
def test_reducing_keeps_the_function(box: Any, when: Any) -> None:
    net, x = planted(), uniform((400, 3))
    symmetries = hidden_symmetries(net, x, box=box)
    before = copy.deepcopy(net.state_dict())
    small = reduce(net, symmetries, when=when)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), net.state_dict().values(), strict=True))
    assert error(outputs(net, x), outputs(small, x)) < EXACT
    assert not linearize.gates(small)
    if box is not None:  # on fresh points, too
        certain = reduce(net, [s for s in symmetries if s.evidence == "box"], when=when)
        assert error(outputs(net, uniform((2000, 3))), outputs(certain, uniform((2000, 3)))) > EXACT
        points = uniform((2000, 3))
        assert error(outputs(net, points), outputs(certain, points)) < EXACT
    far = 1000 * uniform((400, 3))  # negative control: elsewhere it is another function
    assert error(outputs(net, far), outputs(small, far)) > 1e-3
    if when == "cheaper":
        assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in net.parameters())
        assert all(isinstance(layer, PartialActivation) for layer in (small.act1, small.act2))


def test_every_kind_alone_keeps_the_function() -> None:
    net, x = planted(), uniform((300, 3))
    symmetries = hidden_symmetries(net, x, box=(-1, 1))
    for kind in ("inactive", "active", "parallel", "unseen"):
        some = [s for s in symmetries if s.kind == kind]
        assert some
        assert error(outputs(net, x), outputs(reduce(net, some), x)) < EXACT, kind


def test_a_channel_read_by_dead_ones_only_is_unseen() -> None:
    net, x = planted(), uniform((300, 3))
    with torch.no_grad():
        assert isinstance(net.b, nn.Linear)
        net.b.weight[1:, 6] = 0.0  # only the inactive channel 0 of the second layer reads channel 6
    (unseen,) = [s for s in hidden_symmetries(net, x, box=(-1, 1)) if s.kind == "unseen" and s.site == "act1"]
    assert (unseen.channels, unseen.evidence, unseen.requires) == ((6,), "box", (("act2", 0, 0.0),))
    assert linearize.gates(net) == {}
    points = uniform((500, 3))
    assert error(outputs(net, points), outputs(reduce(net, [unseen]), points)) < EXACT


class Masked(nn.Module):
    """The second layer looks at channel 0 of the first only where the data never goes."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.act1 = nn.Linear(2, 3), nn.ReLU()
        self.b, self.act2, self.c = nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 1)
        with torch.no_grad():
            self.a.weight.copy_(torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.3, 1.0]]))
            self.a.bias.zero_()
            self.b.weight.copy_(torch.tensor([[-9.0, 1.0, 0.0], [0.0, 1.0, 1.0]]))
            self.b.bias.copy_(torch.tensor([0.0, 0.5]))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.c(self.act2(self.b(self.act1(self.a(x)))))
        return out


def test_a_channel_that_only_pushes_down_what_is_down_is_unseen_on_the_data() -> None:
    net, x = Masked().double(), uniform((200, 2))
    found = kinds(net, x)
    assert found["act1", "unseen", "data"] == [(0,)]
    assert error(outputs(net, x), outputs(reduce(net, hidden_symmetries(net, x)), x)) < EXACT
    assert ("act1", "unseen", "box") not in kinds(net, x, box=(-1, 1))


def test_nothing_is_found_where_nothing_is() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 6), nn.GELU(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 2)).double()
    assert hidden_symmetries(net, uniform((300, 3)), box=(-1, 1)) == []
    assert canonical_distance(reduce(net, []), net, uniform((1, 3))) == 0


def shift(model: nn.Module, amount: float) -> None:
    """Push some channels of every hidden map far to one side."""
    with torch.no_grad():
        for module in model.modules():
            bias = getattr(module, "bias", None)
            if isinstance(bias, nn.Parameter) and bias.numel() >= 8:
                bias[0::4] += amount
                bias[1::4] -= amount


REDUCED = (
    "mlp deep_mlp batch_norm_between conv_strided_dilated pointwise_then_padded grouped_consumer inverted_residual "
    "pooled_head two_consumers_and_dict_output tied_weights repeated_block shared_activation gated_unit_by_keyword "
    "residual inner_norm weight_norm parametric_per_channel"
).split()


@pytest.mark.parametrize("name", REDUCED)
def test_networks_of_every_kind_can_be_reduced(name: str) -> None:
    model, inputs = toys.make(name, torch.float64)
    shift(model, 25.0)
    symmetries = hidden_symmetries(model, inputs)
    small = reduce(model, symmetries)
    assert error(outputs(model, inputs), outputs(small, inputs)) < EXACT
    assert "evidence" in symmetry_table(symmetries)
    assert json.loads(json.dumps([s.to_dict() for s in symmetries])) is not None


class Pooled(nn.Module):
    """Convolutions, norm, pooling, a residual sum, and activations of several kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.act = nn.Conv2d(2, 8, 3, padding=1), toys.shaken(nn.BatchNorm2d(8)), nn.ReLU6()
        self.pool, self.conv2, self.act2 = nn.MaxPool2d(2), nn.Conv2d(8, 8, 3, padding=1, groups=4), nn.Hardswish()
        self.conv3, self.act3, self.head = nn.Conv2d(8, 8, 1), nn.LeakyReLU(0.1), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.act(self.norm(self.conv(x))))
        x = x - 0.5 * self.act2(self.conv2(x))
        x = torch.cat([self.act3(self.conv3(x))[:, :4], x[:, 4:]], dim=1)
        out: Tensor = self.head(nn.functional.avg_pool2d(x, 2).mean((2, 3)))
        return out


def mlp_of(activation: Callable[[], nn.Module]) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), activation(), nn.Linear(6, 6), activation(), nn.Linear(6, 3))


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "pooled": (Pooled, (2, 8, 8)),
    "gelu": (lambda: mlp_of(nn.GELU), (4,)),
    "silu": (lambda: mlp_of(nn.SiLU), (4,)),
    "tanh": (lambda: mlp_of(nn.Tanh), (4,)),
    "in place": (lambda: mlp_of(lambda: nn.ReLU(inplace=True)), (4,)),
}


@pytest.mark.parametrize("name", list(MODELS))
def test_bounds_hold_for_every_op(name: str) -> None:
    """Each node's value on points of the box lies in its interval, in a plain and in a half linear model."""
    make, sizes = MODELS[name]
    torch.manual_seed(5)
    model = make().double().eval()
    gated = linearize.convert(model, torch.randn(1, *sizes, dtype=torch.float64))
    for gate in linearize.gates(gated).values():
        gate.linearize_(torch.arange(gate.channels) % 3 == 0)
        gate.alpha.data[1] = 0.3
    for net in (model, gated):
        captured = capture(net, normalize_inputs(torch.zeros(1, *sizes, dtype=torch.float64)))
        box = box_of(input_shapes(captured), (-0.5, 1.5))
        known = bounds(net, captured, find_units(net, captured), box)
        result = list(captured.graph.nodes)[-1].args[0][0]
        last = known[result]
        assert isinstance(last, Interval), "every op of these models is understood"
        with torch.no_grad():
            values = torch.cat([net(uniform((1, *sizes), -0.5, 1.5)) for _ in range(300)])
        assert bool((values >= last.low).all())
        assert bool((values <= last.high).all())
        corners = torch.where(torch.rand(300, *sizes) < 0.5, -0.5, 1.5).double()
        with torch.no_grad():
            values = torch.cat([net(corner[None]) for corner in corners])
        assert bool(((values >= last.low) & (values <= last.high)).all())


def test_what_is_not_understood_is_unbounded() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 1)).double()
    with torch.no_grad():
        linear(net[2]).bias.fill_(-100.0)
    assert list(kinds(net, uniform((50, 3)), box=(-1, 1))) == [("3", "inactive", "data")]


def test_one_linear_layer_has_the_exact_interval() -> None:
    net = nn.Sequential(nn.Linear(2, 1)).double()
    with torch.no_grad():
        linear(net[0]).weight.copy_(torch.tensor([[2.0, -1.0]]))
        linear(net[0]).bias.fill_(0.5)
    captured = capture(net, normalize_inputs(torch.zeros(1, 2, dtype=torch.float64)))
    low, high = torch.tensor([0.0, -1.0]), torch.tensor([1.0, 3.0])
    known = bounds(net, captured, (), box_of([(1, 2)], (low, high)))
    last = known[list(captured.graph.nodes)[-1].args[0][0]]
    assert isinstance(last, Interval)
    assert [float(last.low), float(last.high)] == pytest.approx([-2.5, 3.5])
    assert float(last.low) < -2.5 < 3.5 < float(last.high)  # with room for rounding


def linear(module: nn.Module) -> nn.Linear:
    assert isinstance(module, nn.Linear)
    return module


def disguised(net: nn.Sequential) -> nn.Sequential:
    """The same function, each hidden channel scaled and moved elsewhere."""
    other = copy.deepcopy(net)
    with torch.no_grad():
        for place in (0, 2):
            before, after = linear(other[place]), linear(other[place + 2])
            order, scale = torch.randperm(before.out_features), torch.rand(before.out_features).double() + 0.5
            before.weight.copy_((before.weight * scale[:, None])[order])
            before.bias.copy_((before.bias * scale)[order])
            after.weight.copy_((after.weight / scale)[:, order])
    return other


def test_the_canonical_form_sees_through_scaling_and_order() -> None:
    torch.manual_seed(2)
    net = nn.Sequential(nn.Linear(3, 7), nn.ReLU(), nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 2)).double()
    x, other = uniform((50, 3)), disguised(net)
    assert error(outputs(net, x), outputs(other, x)) < EXACT
    assert error(outputs(net, x), outputs(canonical(net, x), x)) < EXACT
    assert canonical_distance(net, other, x) < EXACT
    with torch.no_grad():
        linear(other[2]).bias[0] += 1e-3
    assert canonical_distance(net, other, x) > 1e-5
    smaller = nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 2)).double()
    assert canonical_distance(net, smaller, x) == float("inf")
    smooth = nn.Sequential(nn.Linear(3, 7), nn.GELU(), nn.Linear(7, 2)).double()
    assert error(outputs(smooth, x), outputs(canonical(smooth, x), x)) < EXACT
    with pytest.raises(linearize.UsageError, match="has gates"):
        canonical(linearize.convert(net, x), x)


def test_bad_input() -> None:
    net, x = planted(), uniform((10, 3))
    symmetries = hidden_symmetries(net, x)
    with pytest.raises(linearize.CaptureError, match="does not run"):
        hidden_symmetries(net, uniform((10, 4)))
    with pytest.raises(linearize.UsageError, match="does not fit inputs"):
        hidden_symmetries(net, x, box=(torch.zeros(5), torch.ones(5)))
    with pytest.raises(linearize.UsageError, match="above its high end"):
        hidden_symmetries(net, x, box=(1, -1))
    other = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2)).double()
    with pytest.raises(linearize.UsageError, match="no gated site"):
        reduce(other, symmetries)
