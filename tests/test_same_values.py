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


class Keeping(nn.Module):
    """Keeps a feature map, and an auxiliary loss of another, on itself and in a list."""

    def __init__(self, kept: str) -> None:
        super().__init__()
        self.first, self.act, self.last, self.kept = nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 4), kept
        self.more, self.act2, self.end = nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 4)
        self.seen: list[Tensor] = []
        self.feature: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        h = self.act(self.first(x))
        if self.kept == "feature":
            self.feature = h
        elif self.kept == "loss":
            self.feature = h.square().mean()
        elif self.kept == "list":
            self.seen.append(h)
        x = self.last(h)
        return self.end(self.act2(self.more(x)))

    def held(self) -> list[Tensor]:
        return [*self.seen, *([] if self.feature is None else [self.feature])]


@pytest.mark.parametrize("kept", ["feature", "loss", "list", "nothing"])
def test_what_a_forward_keeps_is_the_same_after_collapsing(kept: str) -> None:
    torch.manual_seed(2)
    model = Keeping(kept).double().eval()
    x = DATA[0].double()
    gated: Any = linearize.convert(model, x)
    assert model.held() == []
    for gate in linearize.gates(gated).values():
        gate.slope.copy_(torch.linspace(-1, 1, 32))
        gate.linearize_(torch.arange(32) < 20)
    small: Any = linearize.collapse(gated, when="always")
    torch.testing.assert_close(small(x), gated(x), rtol=0, atol=1e-12)
    assert len(small.held()) == len(gated.held()) == (kept != "nothing")
    for a, b in zip(small.held(), gated.held(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    reasons = {row.name: row.reason for row in linearize.summary(gated).sites}
    assert small.end.in_features < 32  # what is kept elsewhere bars nothing here
    assert (reasons["act"] is None) == (kept == "nothing"), reasons


class Overwriting(nn.Module):
    """A gated unit in place, in the two halves of one tensor."""

    def __init__(self, act: nn.Module) -> None:
        super().__init__()
        self.first, self.act, self.last = nn.Linear(4, 32), act, nn.Linear(16, 4)
        self.more, self.act2 = nn.Linear(4, 8), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        a, b = h[:, :16], h[:, 16:]
        return self.last(b.mul_(self.act(a))) + self.act2(self.more(x)).sum()


def test_a_gate_whose_input_is_overwritten_is_taken_back() -> None:
    """ReLU keeps its output for the backward pass, a gate its input: nobody could train the gated model."""
    torch.manual_seed(2)
    model = Overwriting(nn.ReLU()).eval()
    gated: Any = linearize.convert(model, DATA[0])
    assert set(linearize.gates(gated)) == {"act2"}
    assert "overwritten later" in str(linearize.summary(gated))
    model(DATA[0]).sum().backward()
    gated(DATA[0]).sum().backward()
    torch.testing.assert_close(gated.first.weight.grad, model.first.weight.grad, rtol=1e-6, atol=1e-6)
