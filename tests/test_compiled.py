"""Models with compiled parts: hooks are seen, or the compiled model is refused with the reason."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import linearize

X = [torch.randn(64, 8, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]


class TwoInputs(nn.Module):
    """Two positional inputs, of which the second is no label."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        out: Tensor = self.body(x + y)
        return out


def build() -> nn.Module:
    torch.manual_seed(0)
    inner = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 8))
    return nn.Sequential(inner, nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4)).eval()


def _whole(model: nn.Module) -> nn.Module:
    made: nn.Module = torch.compile(model, backend="eager")  # type: ignore[assignment]
    return made


def _part(model: nn.Module) -> nn.Module:
    model.register_module("0", _whole(model.get_submodule("0")))
    return model


def _in_place(model: nn.Module) -> nn.Module:
    model.compile(backend="eager")
    return model


@pytest.mark.parametrize("compiled", [_whole, _part, _in_place])
def test_calibrate_sees_every_row(compiled: Callable[[nn.Module], nn.Module]) -> None:
    plain, model = linearize.convert(build(), X[0]), compiled(linearize.convert(build(), X[0]))
    with torch.no_grad():
        model(X[0])  # so that there is compiled code before anything watches
    expected = linearize.calibrate(plain, X, progress=False).sites
    found = linearize.calibrate(model, X, progress=False).sites
    assert [site.count for site in found.values()] == [256, 256]
    for one, other in zip(expected.values(), found.values(), strict=True):
        assert torch.allclose(one.slope, other.slope, rtol=1e-6, atol=1e-8)
        assert torch.allclose(one.residual, other.residual, rtol=1e-6, atol=1e-8)


def test_a_compiled_model_of_two_inputs_is_called_with_both() -> None:
    model = _whole(linearize.convert(TwoInputs(), (X[0], X[1])))
    assert linearize.calibrate(model, [(X[0], X[1])], progress=False).sites["body.1"].count == 64


@pytest.mark.filterwarnings("ignore:Using .torch.compile:UserWarning")  # costs are counted by global hooks
@pytest.mark.parametrize("compiled", [_part, _in_place])
def test_compress_takes_models_with_compiled_parts(compiled: Callable[[nn.Module], nn.Module]) -> None:
    model = compiled(build())
    with torch.no_grad():
        expected = model(X[0])
    result = linearize.compress(model, X, flops=0.7, rounds=0, progress=False, cache=False)
    plain = linearize.compress(build(), X, flops=0.7, rounds=0, progress=False, cache=False)
    assert [(s.form, s.linear) for s in result.plan.sites] == [(s.form, s.linear) for s in plain.plan.sites]
    with torch.no_grad():
        assert torch.equal(model(X[0]), expected)
        assert torch.allclose(result.model(X[0]), plain.model(X[0]), rtol=1e-5, atol=1e-6)


def test_a_compiled_model_is_refused_with_the_remedy() -> None:
    model, gated = _whole(build()), _whole(linearize.convert(build(), X[0]))
    for call in (
        lambda: linearize.convert(model, X[0]),
        lambda: linearize.summary(model, X[0]),
        lambda: linearize.compress(model, X, flops=0.7, rounds=0, progress=False),
        lambda: linearize.collapse(gated),
    ):
        with pytest.raises(linearize.ConvertError, match=r"compiled model\. Pass the eager model and compile"):
            call()
