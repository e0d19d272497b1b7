"""verify: what counts as the same function, and what never does."""

from __future__ import annotations

import json
import math
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from linearize.errors import UsageError
from linearize.verify import verify


class Returns(nn.Module):
    """Gives back a fixed output, whatever comes in."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output = output

    def forward(self, x: Tensor) -> Any:
        return self.output


class Pair(NamedTuple):
    left: Tensor
    right: Tensor


@dataclass
class Output:
    logits: Tensor
    cache: object = None


X = torch.zeros(1)


def errors(a: Any, b: Any, **options: Any) -> Any:
    return verify(Returns(a), Returns(b), X, **options)


def test_errors_are_relative_to_the_reference() -> None:
    a, b = torch.tensor([3.0, 4.0]), torch.tensor([3.0, 4.5])
    found = errors(a, b)
    assert found.max_error == pytest.approx(0.5 / 4)
    assert found.rms_error == pytest.approx(0.5 / 5)
    assert not found
    assert errors(a, b, tolerance=0.2)


def test_errors_are_taken_over_all_batches() -> None:
    reference = nn.Linear(3, 2)
    candidate = nn.Linear(3, 2)
    candidate.load_state_dict(reference.state_dict())
    with torch.no_grad():
        candidate.weight[0, 0] += 1
    small, large = torch.randn(2, 3), torch.randn(5, 3)
    both = verify(reference, candidate, [small, (large,)])
    joined = verify(reference, candidate, torch.cat([small, large]))
    assert both.max_error == pytest.approx(joined.max_error)
    assert both.rms_error == pytest.approx(joined.rms_error)


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.float16, 4e-3), (torch.bfloat16, 3.2e-2)],
)
def test_tolerance_follows_the_dtype(dtype: torch.dtype, tolerance: float) -> None:
    assert errors(torch.ones(2, dtype=dtype), torch.ones(2, dtype=dtype)).outputs[0].tolerance == tolerance


def test_tolerance_follows_coarse_parameters() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Identity()).to(torch.bfloat16)

    class Upcast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.inner(x.bfloat16()).float()
            return out

    assert verify(Upcast(), Upcast(), torch.ones(1, 2)).outputs[0].tolerance == 3.2e-2


def test_zero_reference() -> None:
    zero = torch.zeros(3)
    assert errors(zero, zero)
    assert errors(zero, torch.ones(3)).max_error == math.inf


@pytest.mark.parametrize("nan_in", ["reference", "candidate", "both"])
def test_nan_never_passes(nan_in: str) -> None:
    good, bad = torch.ones(2), torch.tensor([1.0, math.nan])
    a = good if nan_in == "candidate" else bad
    b = good if nan_in == "reference" else bad
    found = errors(a, b, tolerance=math.inf)
    assert not found
    assert math.isnan(found.max_error)
    json.dumps(found.to_dict(), allow_nan=False)


def test_infinite_values_must_agree_and_do_not_hide_the_rest() -> None:
    masked = torch.tensor([-math.inf, 1.0])
    assert errors(masked, masked.clone())
    assert errors(masked, torch.tensor([-math.inf, 2.0])).max_error == 1.0
    assert "infinite" in str(errors(masked, torch.tensor([math.inf, 1.0])))


@pytest.mark.parametrize(
    ("a", "b", "reason"),
    [
        (torch.ones(2), torch.ones(3), "shape (3,) instead of (2,)"),
        (torch.ones(2), torch.ones(2, dtype=torch.float64), "float64 instead of float32"),
        (torch.ones(2), None, "NoneType instead of Tensor"),
        ((torch.ones(2), torch.ones(2)), (torch.ones(2),), "missing in the candidate"),
        ({"a": torch.ones(2)}, {"a": torch.ones(2), "b": X}, "only in the candidate"),
        (torch.tensor([1, 2]), torch.tensor([1, 3]), "integers differ"),
        (torch.tensor([2**60]), torch.tensor([2**60 + 1]), "integers differ"),
        (torch.tensor([True]), torch.tensor([False]), "integers differ"),
        ({"loss": X, "step": 1}, {"loss": X, "step": 2}, "2 instead of 1"),
    ],
)
def test_mismatch_fails_with_its_reason(a: Any, b: Any, reason: str) -> None:
    found = errors(a, b, tolerance=math.inf)
    assert not found
    assert reason in str(found)


def test_names_of_nested_outputs() -> None:
    output = OrderedDict(
        logits=torch.ones(1), states=(torch.ones(2), [torch.ones(3)]), pair=Pair(torch.ones(1), torch.ones(2))
    )
    names = [o.name for o in errors(output, output).outputs]
    assert names == ["logits", "states.0", "states.1.0", "pair.0", "pair.1"]
    assert [o.name for o in errors(Output(X), Output(X)).outputs] == ["logits"]


def test_what_holds_no_numbers_is_named() -> None:
    found = errors(Output(X, cache=object()), Output(X, cache=object()))
    assert found.ignored == ("cache",)
    assert "not compared: cache" in str(found)


def test_nothing_to_compare_is_no_pass() -> None:
    assert not errors(None, None)


def test_complex_empty_and_sparse_outputs() -> None:
    a = torch.tensor([1 + 1j])
    assert errors(a, a.clone())
    assert not errors(a, a * 1j)
    assert errors(torch.ones(0, 3), torch.ones(0, 3))
    sparse = torch.tensor([[0.0, 1.0]]).to_sparse()
    assert errors(sparse, sparse)


def test_modes_inputs_and_gradients_are_left_alone() -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.drop = nn.Dropout()
            self.frozen = nn.Dropout().eval()

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.frozen(self.drop(x.mul_(2)))
            return out

    model, x = InPlace().train(), torch.ones(3, requires_grad=True)
    model.frozen.eval()
    assert verify(model, model, x)
    assert torch.equal(x.detach(), torch.ones(3))
    assert model.training
    assert model.drop.training
    assert not model.frozen.training


def test_keyword_inputs() -> None:
    class Keyword(nn.Module):
        def forward(self, *, x: Tensor, scale: float) -> dict[str, Tensor]:
            return {"y": x * scale}

    assert verify(Keyword(), Keyword(), {"x": torch.ones(2), "scale": 2.0})


def test_transformers_outputs() -> None:
    outputs = pytest.importorskip("transformers.modeling_outputs")
    output = outputs.BaseModelOutput(last_hidden_state=torch.ones(1, 2), hidden_states=(torch.ones(1), torch.ones(2)))
    assert [o.name for o in errors(output, output).outputs] == [
        "last_hidden_state",
        "hidden_states.0",
        "hidden_states.1",
    ]


@pytest.mark.parametrize("inputs", [[], [()], "text", None, {"x": 3}])
def test_inputs_without_tensors_are_bad_usage(inputs: Any) -> None:
    with pytest.raises(UsageError, match="inputs"):
        verify(nn.Identity(), nn.Identity(), inputs)


def test_a_model_that_does_not_run_is_named_and_left_in_its_mode() -> None:
    model = nn.Linear(3, 2)
    with pytest.raises(UsageError, match=r"candidate \(Linear\): does not run on the inputs"):
        verify(nn.Identity(), model, torch.ones(1, 7))
    assert model.training


@pytest.mark.parametrize("tolerance", [-1.0, math.nan])
def test_bad_tolerance(tolerance: float) -> None:
    with pytest.raises(UsageError, match="tolerance"):
        errors(X, X, tolerance=tolerance)


def test_prints_as_a_table_and_gives_plain_data() -> None:
    found = errors({"logits": torch.ones(2)}, {"logits": torch.ones(2)})
    assert "logits" in str(found)
    assert "the same function" in str(found)
    assert json.loads(json.dumps(found.to_dict()))["outputs"][0]["passed"] is True
