"""A maximum over positions before a consumer: channels are put in order and dropped in front of it, never merged."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import linearize
from linearize.plan import make_plan
from tests.chain import check_chain, error, outputs, randomize


def stack(*, pool: nn.Module, kernel: int = 3, norm: bool = False) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 12, 3, padding=1),
        nn.ReLU(),
        *([nn.BatchNorm2d(12)] if norm else []),
        pool,
        nn.Conv2d(12, 4, kernel, padding=kernel // 2),
    )


class Both(nn.Module):
    """Pooled into one branch of a concatenation, and read as it is by another map."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.act, self.pool = nn.Conv2d(3, 8, 1), nn.SiLU(), nn.MaxPool2d(3, 1, 1)
        self.side, self.out = nn.Conv2d(8, 5, 3, padding=1), nn.Conv2d(13, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.act(self.one(x))
        out: Tensor = self.out(torch.cat((self.side(h), self.pool(h)), 1))
        return out


NETS: dict[str, Any] = {
    "padded": lambda: stack(pool=nn.MaxPool2d(3, 2, 1)),
    "ceil": lambda: stack(pool=nn.MaxPool2d(2, ceil_mode=True), kernel=1),
    "dilated": lambda: stack(pool=nn.MaxPool2d(2, 1, dilation=2), kernel=1),
    "both": Both,
}


@pytest.mark.parametrize("when", ["always", "cheaper"])
@pytest.mark.parametrize("share", [0.5, 1.0])
@pytest.mark.parametrize("name", NETS)
def test_same_function(name: str, share: float, when: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 9, 7, dtype=torch.float64)
    gated, _ = check_chain(NETS[name]().double().eval(), x, share, when=when)
    if when == "always":
        assert {site.form for site in make_plan(gated, when="always").sites} == {"factored"}


def test_constants_leave() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 9, 7, dtype=torch.float64)
    gated = linearize.convert(stack(pool=nn.MaxPool2d(3, 2, 1), kernel=1).double().eval(), x)
    (gate,) = linearize.gates(gated).values()
    gate.slope.zero_()
    gate.intercept.normal_()
    gate.linearize_(torch.arange(12) < 7)
    small = linearize.collapse(gated)
    assert small.get_submodule("0").out_channels == 5
    assert error(outputs(gated, x), outputs(small, x)) <= 1e-12


def test_a_norm_in_front_of_a_maximum_stays() -> None:
    """Its scales may be negative: it cannot pass the maximum."""
    torch.manual_seed(0)
    model, x = stack(pool=nn.MaxPool2d(2), norm=True).double().eval(), torch.randn(2, 3, 9, 7, dtype=torch.float64)
    nn.init.normal_(model.get_parameter("2.weight"))
    gated, collapsed = check_chain(model, x)
    (gate,) = linearize.gates(gated).values()
    assert gate.site is not None
    assert "max_pool2d is not linear" in (gate.site.reason or "")
    assert isinstance(collapsed.get_submodule("2"), nn.BatchNorm2d)


def test_budgets_refit_what_is_pooled() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(stack(pool=nn.MaxPool2d(2), kernel=1), nn.Flatten()).eval()
    with torch.no_grad():
        conv = model.get_submodule("0.0")
        conv.weight[6:] = conv.weight[:6]  # type: ignore[index, operator]
        conv.bias[6:] = conv.bias[:6]  # type: ignore[index, operator]
    data = [(torch.randn(4, 3, 8, 8),) for _ in range(6)]
    result = linearize.compress(model, data, flops=0.55)
    assert result.report.after.flops <= 0.55 * result.report.before.flops
    assert error(outputs(model, data[0]), outputs(result.model, data[0])) < 5e-3  # the ridge of the regression


def test_nothing_is_merged_over_a_maximum() -> None:
    """Over a mean, which is linear, everything is."""
    torch.manual_seed(0)
    x = torch.randn(2, 3, 9, 7, dtype=torch.float64)
    pooled = linearize.convert(stack(pool=nn.MaxPool2d(2), kernel=1).double().eval(), x)
    mean = linearize.convert(stack(pool=nn.AvgPool2d(2), kernel=1).double().eval(), x)
    for gated, merged in ((pooled, False), (mean, True)):
        randomize(gated, 1.0)
        forms = {site.form for site in make_plan(gated, when="always").sites}
        assert (forms <= {"vanished", "merged", "merged (input)"}) == merged
