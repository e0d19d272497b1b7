"""Path lengths: against the enumeration of every single path, the paper's example, and what is known in closed form."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import linearize
from linearize.analysis import PathGraph, average_path_length
from linearize.surgery.layers import BlendedActivation, MaskedActivation, PartialActivation
from tests import toys
from tests.chain import randomize


@dataclass(frozen=True)
class Node:
    """One layer of a random network: its kind, what it reads, its channels, and which of them are nonlinear."""

    kind: str
    reads: tuple[int, ...]
    channels: int
    nonlinear: tuple[bool, ...] = ()


class Net(nn.Module):
    """The network of a list of nodes, on (batch, channels, positions); node 0 is the input."""

    def __init__(self, nodes: list[Node]) -> None:
        super().__init__()
        self.nodes = nodes
        self.layers = nn.ModuleDict()
        for place, node in enumerate(nodes):
            before = nodes[node.reads[0]].channels if node.reads else 0
            if node.kind in ("dense", "depthwise", "grouped"):
                groups = {"dense": 1, "depthwise": before, "grouped": 2}[node.kind]
                self.layers[str(place)] = nn.Conv1d(before, node.channels, 3, padding=1, groups=groups)
            elif node.kind == "act":
                gate = linearize.ChannelGate(nn.ReLU(), before, -2)
                self.layers[str(place)] = gate.linearize_(~torch.tensor(node.nonlinear))

    def forward(self, x: Tensor) -> Tensor:
        values = [x]
        for place, node in enumerate(self.nodes[1:], start=1):
            read = [values[i] for i in node.reads]
            if node.kind == "add":
                values.append(read[0] + read[1])
            elif node.kind == "cat":
                values.append(torch.cat(read, dim=1))
            else:
                values.append(self.layers[str(place)](read[0]))
        return values[-1]


def random_nodes(seed: int) -> list[Node]:
    """A random graph of at most 4 channels wide branches, which ends in a dense layer."""
    dice = random.Random(seed)  # noqa: S311 - a network, no secret
    nodes = [Node("input", (), dice.randint(1, 4))]
    while len(nodes) < 9:
        kind = dice.choice(("dense", "dense", "act", "act", "add", "cat", "depthwise", "grouped"))
        read = len(nodes) - 1 if dice.random() < 0.6 else dice.randrange(len(nodes))
        channels = nodes[read].channels
        if kind == "dense":
            nodes.append(Node(kind, (read,), dice.randint(1, 4)))
        elif kind == "act":
            nodes.append(Node(kind, (read,), channels, tuple(dice.random() < 0.6 for _ in range(channels))))
        elif kind == "depthwise":
            nodes.append(Node(kind, (read,), channels))
        elif kind == "grouped" and channels % 2 == 0:
            nodes.append(Node(kind, (read,), 4))
        elif kind == "add":
            alike = [i for i, n in enumerate(nodes) if n.channels == channels and i != read]
            if alike:
                nodes.append(Node(kind, (read, dice.choice(alike)), channels))
        elif kind == "cat":
            other = dice.randrange(len(nodes))
            if other != read and channels + nodes[other].channels <= 6:
                nodes.append(Node(kind, (read, other), channels + nodes[other].channels))
    nodes.append(Node("dense", (len(nodes) - 1,), 2))
    return nodes


def entries(nodes: list[Node], place: int) -> list[float]:
    """How likely a walk that comes to a node arrives at each of its channels."""
    node = nodes[place]
    if node.kind == "cat":
        return [share / 2 for read in node.reads for share in entries(nodes, read)]
    if node.kind == "add":
        a, b = (entries(nodes, read) for read in node.reads)
        return [(x + y) / 2 for x, y in zip(a, b, strict=True)]
    if node.kind in ("act", "depthwise"):
        return entries(nodes, node.reads[0])
    if node.kind == "grouped":
        before = entries(nodes, node.reads[0])
        halves = (sum(before[: len(before) // 2]), sum(before[len(before) // 2 :]))
        return [half / (node.channels // 2) for half in halves for _ in range(node.channels // 2)]
    return [1 / node.channels] * node.channels


def paths(nodes: list[Node], place: int, channel: int, normalized: bool) -> Iterator[tuple[float, int]]:
    """Weight and length of every path from the input to a channel, one by one."""
    node = nodes[place]
    steps: list[tuple[int, int, float]] = []  # node, channel and probability of each step backwards
    if node.kind == "input":
        yield 1.0, 0
        return
    before = nodes[node.reads[0]].channels
    if node.kind == "dense":
        steps = [(node.reads[0], c, share) for c, share in enumerate(entries(nodes, node.reads[0]))]
    elif node.kind == "grouped":
        group = channel // (node.channels // 2)
        inside = range(group * before // 2, (group + 1) * before // 2)
        shares = entries(nodes, node.reads[0])
        steps = [(node.reads[0], c, shares[c] / sum(shares[i] for i in inside)) for c in inside]
    elif node.kind == "add":
        steps = [(read, channel, 0.5) for read in node.reads]
    elif node.kind == "cat":
        second = channel >= before
        steps = [(node.reads[second], channel - before * second, 1.0)]
    else:
        steps = [(node.reads[0], channel, 1.0)]
    longer = int(node.kind == "act" and node.nonlinear[channel])
    for read, c, share in steps:
        for weight, length in paths(nodes, read, c, normalized):
            yield weight * (share if normalized else 1.0), length + longer


@pytest.mark.parametrize("seed", range(16))
def test_equals_the_enumeration_of_all_paths(seed: int) -> None:
    nodes = random_nodes(seed)
    graph = PathGraph.of(Net(nodes).eval(), torch.randn(2, nodes[0].channels, 5))
    weightings: list[Any] = ["normalized", "unnormalized"]
    for weighting in weightings:
        found = graph.lengths(weighting)
        all_paths = [path for c in range(2) for path in paths(nodes, len(nodes) - 1, c, weighting == "normalized")]
        total = sum(weight for weight, _ in all_paths)
        expected = [0.0] * len(found.distribution)
        for weight, length in all_paths:
            expected[length] += weight / total
        torch.testing.assert_close(found.distribution, torch.tensor(expected, dtype=torch.float64))
        assert float(found) == pytest.approx(sum(length * share for length, share in enumerate(expected)))
        if weighting == "unnormalized":
            assert found.outputs[0].log10_paths == pytest.approx(math.log10(len(all_paths)))


class Skip(nn.Module):
    """One skip around fully connected layers between single end nodes."""

    def __init__(self, layers: int = 4, width: int = 4) -> None:
        super().__init__()
        sizes = [1, *[width] * layers]
        self.hidden = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(sizes))
        self.last = nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = x
        for layer in self.hidden:
            h = torch.relu(layer(h))
        out: Tensor = x + self.last(h)
        return out


def test_the_papers_example() -> None:
    counted = average_path_length(Skip(), torch.randn(3, 1), weighting="unnormalized")
    assert 10 ** (counted.outputs[0].log10_paths or 0) == pytest.approx(257)
    assert float(counted.distribution[0]) == pytest.approx(1 / 257)
    assert float(counted) == pytest.approx(4 * 256 / 257)
    walked = average_path_length(Skip(), torch.randn(3, 1))
    assert walked.distribution.tolist() == pytest.approx([0.5, 0, 0, 0, 0.5])
    assert walked.outputs[0].log10_paths is None


@pytest.mark.parametrize("weighting", ["normalized", "unnormalized"])
@pytest.mark.parametrize("name", ["deep_mlp", "inverted_residual", "permuted_with_scale", "pooled_head", "conv3d"])
def test_a_sequential_network_has_the_sum_of_nonlinear_shares(name: str, weighting: Any) -> None:
    model, inputs = toys.make(name)
    assert float(average_path_length(model, inputs, weighting=weighting)) == len(linearize.summary(model, inputs).sites)
    gated = linearize.convert(model, inputs)
    randomize(gated, 0.4)
    if name == "inverted_residual":  # a depthwise layer keeps the channel: the shares add up channel by channel
        shares = torch.stack([~gate.linear for gate in linearize.gates(gated).values()]).double().mean(1)
    else:
        shares = torch.tensor([float((~g.linear).double().mean()) for g in linearize.gates(gated).values()])
    assert float(average_path_length(gated, inputs, weighting=weighting)) == pytest.approx(float(shares.sum()))


def test_converting_changes_nothing() -> None:
    for name in ("residual", "inner_norm", "repeated_block", "shared_activation", "gated_unit_by_keyword"):
        model, inputs = toys.make(name)
        assert float(average_path_length(linearize.convert(model, inputs), inputs)) == pytest.approx(
            float(average_path_length(model, inputs))
        ), name


def test_the_right_channels_of_permanent_gates_count() -> None:
    masked = MaskedActivation(nn.ReLU(), channels=4, axis=-1)
    masked.linear[1:] = True
    net = nn.Sequential(nn.Linear(3, 4), masked, nn.Linear(4, 8), PartialActivation(nn.ReLU(), keep=6, axis=-1))
    found = average_path_length(net, torch.randn(2, 3))
    assert found.outputs[0].channel_means.tolist() == pytest.approx([1.25] * 6 + [0.25] * 2)
    assert float(found) == pytest.approx(0.25 + 0.75)
    blended = BlendedActivation(nn.ReLU(), channels=4, axis=-1)
    blended.alpha.copy_(torch.tensor([0.0, 0.5, 1.0, 1.0]))
    assert float(average_path_length(nn.Sequential(nn.Linear(3, 4), blended), torch.randn(2, 3))) == 0.5


def test_a_collapsed_model_without_carried_terms_keeps_its_length() -> None:
    model, inputs = toys.make("deep_mlp")
    gated = linearize.convert(model, inputs)
    for place, gate in enumerate(linearize.gates(gated).values()):
        gate.linearize_(torch.full((gate.channels,), place == 1))
    assert float(average_path_length(gated, inputs)) == pytest.approx(2)
    assert float(average_path_length(linearize.collapse(gated, when="always"), inputs)) == pytest.approx(2)


class Dense(nn.Module):
    """Every layer reads all layers before it, through a wide bottleneck."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.wide = nn.ModuleList(nn.Linear(8 * (i + 1), 65536) for i in range(depth))
        self.narrow = nn.ModuleList(nn.Linear(65536, 8) for _ in range(depth))
        self.head = nn.Linear(8 * (depth + 1), 3)

    def forward(self, x: Tensor) -> Tensor:
        seen = [x]
        for wide, narrow in zip(self.wide, self.narrow, strict=True):
            seen.append(narrow(torch.relu(wide(torch.cat(seen, dim=1)))))
        out: Tensor = self.head(torch.cat(seen, dim=1))
        return out


def test_dense_connections_do_not_overflow() -> None:
    depth = 56
    with torch.device("meta"):
        net = Dense(depth)
    graph = PathGraph.of(net, torch.empty(1, 8, device="meta"))
    counted = graph.lengths("unnormalized")
    # Every subset of k layers makes (8 * 65536)^k paths of length k: logarithms, for the numbers are too large.
    logs = [
        math.lgamma(depth + 1) - math.lgamma(k + 1) - math.lgamma(depth - k + 1) + k * math.log(8 * 65536)
        for k in range(depth + 1)
    ]
    expected = torch.softmax(torch.tensor(logs, dtype=torch.float64), 0)
    torch.testing.assert_close(counted.distribution, expected, rtol=1e-9, atol=1e-12)
    assert (counted.outputs[0].log10_paths or 0) > 308  # the largest float has 308 digits
    # Backwards, each layer is as likely as every other that the same concatenation reads: sums of 1 / k.
    harmonic = sum(1 / k for k in range(2, depth + 2))
    assert float(graph.lengths()) == pytest.approx(harmonic)


class Attention(nn.Module):
    def __init__(self, *, fused: bool) -> None:
        super().__init__()
        self.qkv, self.out, self.fused = nn.Linear(8, 24), nn.Linear(8, 8), fused
        self.gate = linearize.ChannelGate(nn.ReLU(), 24, -1)
        self.gate.linearize_(torch.arange(24) % 4 == 0)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.gate(self.qkv(x)).reshape(b, n, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
        if self.fused:
            h = nn.functional.scaled_dot_product_attention(q, k, v)
        else:
            h = ((q @ k.transpose(-2, -1)) * 0.5).softmax(dim=-1) @ v
        return self.out(h.transpose(1, 2).reshape(b, n, c)) if self.training else h.transpose(1, 2).reshape(b, n, c)


@pytest.mark.parametrize("fused", [True, False])
def test_attention_passes_the_channels_of_the_values(fused: bool) -> None:
    found = average_path_length(Attention(fused=fused).eval(), torch.randn(2, 5, 8), weighting="unnormalized")
    assert found.outputs[0].channel_means.tolist() == [0, 1, 1, 1] * 2
    assert 10 ** (found.outputs[0].log10_paths or 0) == pytest.approx(64)
    assert found.opaque == ()


class Excite(nn.Module):
    """A product of two branches, one with a unit more."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(4, 2, 1), nn.Conv2d(2, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.up(torch.relu(self.down(x.mean((2, 3), keepdim=True)))))


def test_a_product_is_a_merge() -> None:
    found = average_path_length(Excite(), torch.randn(1, 4, 5, 5))
    assert found.distribution.tolist() == pytest.approx([0.5, 0, 0.5])


def test_no_path_leads_through_the_constant_gate_of_a_gated_unit() -> None:
    model, inputs = toys.make("packed_unit")
    gated = linearize.convert(model, inputs)
    (gate,) = linearize.gates(gated).values()
    assert float(average_path_length(gated, inputs)) == pytest.approx(0.5)
    gate.linearize_(torch.arange(gate.channels) < 4)  # 12 of 16 channels still have two branches
    assert float(average_path_length(gated, inputs)) == pytest.approx(0.5 * 12 / 16)
    gate.linearize_(torch.ones(gate.channels, dtype=torch.bool))
    assert float(average_path_length(gated, inputs)) == 0


class Strange(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(torch.cdist(torch.relu(self.first(x)), x))
        return out


def test_an_unknown_op_is_reported() -> None:
    found = average_path_length(Strange(), torch.randn(4, 4))
    assert len(found.opaque) == 1
    assert found.opaque[0] in str(found)
    assert found.distribution.tolist() == pytest.approx([0.5, 0.5])


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.relu() if x.sum() > 0 else x


def test_bad_input() -> None:
    with pytest.raises(linearize.CaptureError, match="cannot capture"):
        average_path_length(Branching(), torch.randn(2, 3))
    with pytest.raises(linearize.CaptureError, match="does not run"):
        average_path_length(nn.Linear(3, 3), torch.randn(2, 4))
    with pytest.raises(linearize.UsageError, match="weighting"):
        average_path_length(nn.Linear(3, 3), torch.randn(2, 3), weighting="equal")  # type: ignore[arg-type]
    with pytest.raises(linearize.CaptureError, match="no output depends"):
        average_path_length(Constant(), torch.randn(2, 3))


class Constant(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.ones_like(x)


def test_plain_data_and_a_table() -> None:
    found = average_path_length(toys.make("two_consumers_and_dict_output")[0], torch.randn(3, 6))
    assert [output["mean"] for output in found.to_dict()["outputs"]] == [1.0, 1.0]
    assert found.to_dict()["distribution"] == [0.0, 1.0]
    assert "average path length 1.000 (normalized)" in str(found)


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_efficientnet"])
def test_models_of_timm(name: str) -> None:
    timm = pytest.importorskip("timm")
    graph = PathGraph.of(timm.create_model(name))
    counted, walked = graph.lengths("unnormalized"), graph.lengths()
    assert counted.opaque == ()
    assert 0 < float(walked) <= float(counted) <= len(graph.units)
