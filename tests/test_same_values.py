"""Models that count their calls in buffers, in eval mode too: whatever measures them leaves the counts as they were."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import linearize
from linearize.errors import ConvertError, LinearizeError
from linearize.tensors import same_values

torch.manual_seed(0)
DATA = [torch.randn(32, 4) for _ in range(4)]


class Counting(nn.Module):
    """Counts its calls, and follows the mean of its inputs."""

    calls: Tensor
    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(4), persistent=False)
        self.first, self.act, self.last = nn.Linear(4, 64), nn.GELU(), nn.Linear(64, 4)

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        self.mean.mul_(0.9).add_(x.detach().mean(0))
        return self.last(self.act(self.first(x)))


def counting() -> Counting:
    torch.manual_seed(1)
    return Counting().eval()


def state(model: Any) -> list[float]:
    return [value for buffer in (model.calls, model.mean) for value in buffer.flatten().tolist()]


def compressed(model: nn.Module) -> list[nn.Module]:
    return [linearize.compress(model, DATA, flops=0.7, progress=False).model]


def distilled(model: nn.Module) -> list[nn.Module]:
    linearize.finetune(
        linearize.convert(model, DATA[0]), DATA, teacher=model, distill_weight=1.0, epochs=1, progress=False
    )
    return []


def calibrated(model: nn.Module) -> list[nn.Module]:
    gated = linearize.convert(model, DATA[0])
    linearize.calibrate(gated, DATA, progress=False)
    return [gated, linearize.collapse(gated)]


def verified(model: nn.Module) -> list[nn.Module]:
    gated = linearize.convert(model, DATA[0])
    assert linearize.verify(model, gated, DATA).passed
    return [gated]


def timed(model: nn.Module) -> list[nn.Module]:
    other = counting()
    linearize.benchmark({"one": model, "other": other}, DATA[0], rounds=2)
    return [other]


def explored(model: nn.Module) -> list[nn.Module]:
    gated = linearize.convert(model, DATA[0])
    linearize.average_path_length(gated, DATA[0])
    return [gated]


@pytest.mark.parametrize("use", [compressed, distilled, calibrated, verified, timed, explored])
def test_measuring_counts_no_call(use: Callable[[nn.Module], list[nn.Module]]) -> None:
    model = counting()
    model(DATA[0])
    before = state(model)
    assert before[0] == 1  # a call of the user's own does count
    results = use(model)
    assert state(model) == before
    fresh = [0.0] * len(before)
    assert [state(each) for each in results] == [fresh if use is timed else before for _ in results]


@pytest.mark.parametrize(
    "line",
    ["self.n.add_(1)", "self.n.data.add_(1)", "self.n.add_(1); x = x + self.n", "self.n.copy_(x.detach().mean())"],
)
def test_a_model_without_source_counts_alike(line: str) -> None:
    """Its forward is traced: what it does to a buffer is part of it, and is not done while it is traced."""
    names: dict[str, Any] = {"nn": nn, "torch": torch}
    code = f"""
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("n", torch.zeros(()))
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 1)
    def forward(self, x):
        {line}
        return self.last(self.first(x).relu())
"""
    exec(code, names)  # noqa: S102 - so that its source cannot be read
    model = names["Net"]().eval()
    try:
        gated: Any = linearize.convert(model, DATA[0])
    except LinearizeError:
        assert ".data" in line  # no graph can hold it
        assert float(model.n) == 0
        return
    assert float(model.n) == float(gated.n) == 0
    for x in DATA:
        assert torch.equal(model(x), gated(x))
        assert torch.equal(model.n, gated.n)


def test_a_tensor_in_an_attribute_is_put_back() -> None:
    """It is no buffer, so a traced forward could not hold it: refused, and the model is as it was."""
    names: dict[str, Any] = {"nn": nn, "torch": torch}
    code = """
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.n = torch.zeros(())
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 1)
    def forward(self, x):
        self.n.add_(1)
        return self.last(self.first(x).relu())
"""
    exec(code, names)  # noqa: S102 - so that its source cannot be read
    model = names["Net"]().eval()
    with pytest.raises(ConvertError, match=r"self\.n"):
        linearize.convert(model, DATA[0])
    assert float(model.n) == 0


def test_same_values() -> None:
    layer: Any = nn.Linear(2, 2)
    layer.register_buffer("where", torch.full((2,), torch.nan))
    layer.plain = torch.zeros(3)
    layer.wide = torch.zeros(1).expand(4)
    with torch.inference_mode():
        layer.frozen = torch.zeros(2)
    memory = layer.plain.data_ptr()
    with same_values(layer):
        layer.where.zero_()
        layer.plain.data = torch.ones(5)
        with torch.inference_mode():
            layer.frozen += 1
        layer.weight.data.fill_(1.0)
    assert layer.where.isnan().all()
    assert layer.plain.tolist() == [0.0] * 3
    assert layer.plain.data_ptr() == memory
    assert layer.frozen.tolist() == [0.0] * 2
    assert (layer.weight == 1).all()  # parameters are not looked at
