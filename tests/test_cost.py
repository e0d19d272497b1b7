"""cost: exact counts, without computing where possible."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from linearize.cost import cost
from linearize.errors import UsageError


def test_matrix_products_and_convolutions() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 5 * 5, 7))
    found = cost(model, torch.zeros(2, 3, 5, 5))
    assert found.flops == 2 * 2 * (25 * 3 * 4 * 9 + 100 * 7)
    assert found.parameters == 3 * 4 * 9 + 4 + 700 + 7
    assert found.to_dict() == {"parameters": found.parameters, "flops": found.flops}


def test_attention() -> None:
    class Attends(nn.Module):
        def forward(self, *, x: Tensor) -> Tensor:
            return nn.functional.scaled_dot_product_attention(x, x, x)

    assert cost(Attends(), {"x": torch.zeros(2, 3, 5, 4)}).flops == 2 * (2 * 2 * 3 * 5 * 5 * 4)


def test_shared_parameters_count_once_and_are_used_twice() -> None:
    layer = nn.Linear(3, 3, bias=False)
    found = cost(nn.Sequential(layer, layer), torch.zeros(1, 3))
    assert (found.parameters, found.flops) == (9, 36)


def test_nothing_is_computed_and_nothing_changes() -> None:
    class Looks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(2, 2)
            self.cache: dict[str, Tensor] = {}

        def forward(self, x: Tensor) -> Tensor:
            devices.append(x.device.type)
            self.cache["last"] = x
            out: Tensor = self.linear(x)
            return out

    devices: list[str] = []
    model = Looks()
    before = model.linear.weight
    assert cost(model, torch.zeros(1, 2)).flops == 8
    assert devices == ["meta"]
    assert model.cache == {}
    assert model.linear.weight is before
    assert model.training


def test_a_model_that_reads_its_values_is_run() -> None:
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.linear(x) if x.sum().item() == 2 else x
            return out

    assert cost(Reads(), torch.ones(1, 2)).flops == 8


def test_bad_inputs() -> None:
    with pytest.raises(UsageError, match="does not run"):
        cost(nn.Linear(2, 2), torch.zeros(1, 3))
    with pytest.raises(UsageError, match="2 batches"):
        cost(nn.Linear(2, 2), [torch.zeros(1, 2), torch.zeros(1, 2)])
