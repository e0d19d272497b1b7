"""Functional dimension: known ranks, both methods, batches that grow, bounds, and what does not fit."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

import linearize
from linearize.analysis import TangentRecorder, functional_dimension, kernel_distance, kernel_rank, tangent_kernel
from linearize.analysis.dimension import scaling_bound
from tests import toys


def mlp(*widths: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for a, b in pairwise(widths):
        layers += [nn.Linear(a, b), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def test_a_linear_layer_has_all_its_parameters() -> None:
    found = functional_dimension(nn.Linear(3, 2), torch.randn(40, 3))
    assert (int(found), found.bound, found.parameters, found.saturated) == (8, 8, 8, True)
    assert found.clear


def test_two_linear_layers_have_the_dimension_of_their_product() -> None:
    """Matrices (2, 6) of any rank, and a bias: scaling is one of the symmetries, GL(2) is all of them."""
    found = functional_dimension(nn.Sequential(nn.Linear(6, 3), nn.Linear(3, 2)), torch.randn(100, 6))
    assert int(found) == 2 * 6 + 2
    assert found.saturated


def test_each_hidden_unit_costs_one() -> None:
    torch.manual_seed(3)
    net = mlp(2, 5, 1)
    found = functional_dimension(net, 3 * torch.randn(600, 2))
    assert (found.bound, found.parameters) == (21 - 5, 21)
    assert int(found) == found.bound
    first = net[0]
    assert isinstance(first, nn.Linear)
    first.bias.data[0] = -100.0  # a dead unit: its 2 + 1 + 1 parameters do nothing, one of them was a scaling
    assert int(functional_dimension(net, 3 * torch.randn(600, 2))) == 16 - 3


@pytest.mark.parametrize("widths", [(3, 8, 6, 2), (4, 10, 3)])
def test_the_gram_matrix_finds_the_same_rank(widths: tuple[int, ...]) -> None:
    net, x = mlp(*widths), torch.randn(300, widths[0])
    exact, by_gram = functional_dimension(net, x), functional_dimension(net, x, method="gram")
    assert int(exact) == int(by_gram)
    assert (exact.method, by_gram.method) == ("jacobian", "gram")
    assert int(exact) <= exact.bound
    few = functional_dimension(net, x[:7], method="gram")  # fewer rows than parameters: J J^T
    assert int(few) == 7 * widths[-1]
    assert not few.saturated


def test_memory_decides_and_a_jacobian_too_large_is_named() -> None:
    net, x = mlp(8, 16, 1), torch.randn(200, 8)
    small = functional_dimension(net, x, memory=209_000)  # room for 161 x 161 numbers, not for 164 x 161
    assert small.method == "gram"
    assert int(small) == int(functional_dimension(net, x))
    with pytest.raises(linearize.UsageError, match="161 numbers takes"):
        functional_dimension(net, x, method="jacobian", memory=10_000)
    with pytest.raises(linearize.UsageError, match="Gram matrix"):
        functional_dimension(net, x, memory=10_000)


def test_the_batch_grows_until_the_rank_stops() -> None:
    found = functional_dimension(mlp(2, 6, 1), 3 * torch.randn(2000, 2))
    sizes = [samples for samples, _ in found.batches]
    ranks = [rank for _, rank in found.batches]
    assert all(b <= 2 * a for a, b in pairwise(sizes))
    assert ranks == sorted(ranks)
    assert sizes[-1] < 2000
    assert len(found.spectrum) <= 25
    last, first = found.gap
    assert last > found.tolerance >= first
    assert json.loads(json.dumps(found.to_dict()))["rank"] == int(found)
    assert "functional dimension" in str(found)


def test_gated_convolutional_and_keyword_models() -> None:
    for name in ("pooled_head", "gated_unit_by_keyword", "inplace_and_dropout", "tied_weights"):
        model, inputs = toys.make(name)
        plain = functional_dimension(model, inputs)
        gated = functional_dimension(linearize.convert(model, inputs), inputs)
        assert int(plain) == int(gated), name
        assert plain.parameters == gated.parameters


def test_the_bound_counts_what_can_be_scaled() -> None:
    model, inputs = toys.make("deep_mlp")  # ReLU, tanh, ELU
    assert scaling_bound(model, inputs) == sum(p.numel() for p in model.parameters()) - 12
    model, inputs = toys.make("grouped_producer")
    assert scaling_bound(model, inputs) == sum(p.numel() for p in model.parameters()) - 12
    model, inputs = toys.make("tied_weights")
    assert scaling_bound(model, inputs) == sum(p.numel() for p in model.parameters())


def test_bad_input() -> None:
    with pytest.raises(linearize.UsageError, match="does not run on inputs of shapes"):
        functional_dimension(mlp(3, 4, 1), torch.randn(5, 4))
    with pytest.raises(linearize.UsageError, match="samples"):
        functional_dimension(mlp(3, 4, 1), torch.randn(0, 3))
    with pytest.raises(linearize.UsageError, match="no parameters"):
        functional_dimension(nn.ReLU(), torch.randn(3, 3))
    with pytest.raises(linearize.UsageError, match="method"):
        functional_dimension(mlp(3, 4, 1), torch.randn(3, 3), method="fast")  # type: ignore[arg-type]


def finite_differences(net: nn.Module, x: Tensor, step: float = 1e-6) -> Tensor:
    net = net.double()
    columns = []
    with torch.no_grad():
        for parameter in net.parameters():
            for i in range(parameter.numel()):
                flat = parameter.view(-1)
                flat[i] += step
                up = net(x)
                flat[i] -= 2 * step
                columns.append((up - net(x)).flatten() / (2 * step))
                flat[i] += step
    return torch.stack(columns, 1)


def test_the_kernel_is_that_of_finite_differences() -> None:
    net, x = mlp(3, 5, 2), torch.randn(4, 3, dtype=torch.float64)
    kernel = tangent_kernel(net, x)
    j = finite_differences(net, x)
    torch.testing.assert_close(kernel, j @ j.T, rtol=1e-6, atol=1e-8)
    assert kernel_rank(kernel) == 8
    assert kernel_distance(kernel, 3 * kernel) < 1e-12
    with pytest.raises(linearize.UsageError, match="same inputs"):
        kernel_distance(kernel, kernel[:4, :4])


def test_the_recorder_measures_from_the_start() -> None:
    net, x = mlp(3, 8, 1), torch.randn(6, 3)
    recorder = TangentRecorder(x)
    recorder.record(net, loss=1.0)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    assert recorder.record(net)["distance"] > 1e-3
    assert [row["step"] for row in recorder.curve] == [0, 1]
    assert recorder.curve[0]["loss"] == 1.0
