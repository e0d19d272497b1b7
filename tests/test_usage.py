"""What a user relies on still works in the model returned: hooks, copies, states, types, feature pyramids."""

from __future__ import annotations

import copy
import functools
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import linearize
from tests.chain import check_chain, randomize

pytestmark = pytest.mark.zoo

SIZE = (2, 3, 64, 64)


def timm_model(name: str, **kwargs: Any) -> nn.Module:
    import timm

    torch.manual_seed(0)
    model: nn.Module = timm.create_model(name, **kwargs).eval()
    return model


def bert() -> nn.Module:
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    return BertModel(config).eval()


def cases() -> dict[str, tuple[nn.Module, Any]]:
    return {
        "vit": (timm_model("test_vit", img_size=64), torch.randn(SIZE)),
        "efficientnet": (timm_model("test_efficientnet"), torch.randn(SIZE)),
        "bert": (bert(), {"input_ids": torch.arange(12).reshape(2, 6)}),
    }


@pytest.fixture(scope="module", params=["vit", "efficientnet", "bert"])
def stages(request: pytest.FixtureRequest) -> dict[str, Any]:
    """A model, its inputs, and the model with linear channels, gated and collapsed."""
    model, inputs = cases()[request.param]
    gated = linearize.convert(model, inputs)
    randomize(gated, 0.5)
    return {"original": model, "inputs": inputs, "gated": gated, "collapsed": linearize.collapse(gated)}


def call(model: nn.Module, inputs: Any) -> Tensor:
    with torch.no_grad():
        out = model(**inputs) if isinstance(inputs, dict) else model(inputs)
    return out if isinstance(out, Tensor) else out[0]


STAGES = pytest.mark.parametrize("stage", ["gated", "collapsed"])


@STAGES
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])  # noqa: S301 - own
def test_copies(stages: dict[str, Any], stage: str, copied: Callable[[nn.Module], nn.Module]) -> None:
    model = stages[stage]
    assert type(copied(model)) is type(model) or type(copied(model)).__name__ == type(model).__name__
    assert torch.equal(call(copied(model), stages["inputs"]), call(model, stages["inputs"]))


@STAGES
def test_state_dict_goes_around(stages: dict[str, Any], stage: str) -> None:
    model = stages[stage]
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert not torch.equal(call(other, stages["inputs"]), call(model, stages["inputs"]))
    other.load_state_dict(model.state_dict())
    assert torch.equal(call(other, stages["inputs"]), call(model, stages["inputs"]))


def test_names_of_the_state_dict_survive_gates(stages: dict[str, Any]) -> None:
    assert set(stages["original"].state_dict()) <= set(stages["gated"].state_dict())


@STAGES
def test_hooks_see_the_same_places(stages: dict[str, Any], stage: str) -> None:
    """Every module between the sites puts out what it did: hooks on blocks are how features are taken."""
    model, inputs = stages[stage], stages["inputs"]
    seen: list[str] = []
    blocks = [name for name, module in model.named_children() if any(True for _ in module.parameters())]
    handles = [
        model.get_submodule(name).register_forward_hook(lambda *_, name=name: seen.append(name)) for name in blocks
    ]
    try:
        call(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    assert set(seen) >= {name for name in blocks if name not in {"norm", "fc_norm"}}


@STAGES
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_types(stages: dict[str, Any], stage: str, dtype: torch.dtype) -> None:
    model = copy.deepcopy(stages[stage]).to(dtype)
    inputs = stages["inputs"] if isinstance(stages["inputs"], dict) else stages["inputs"].to(dtype)
    reference, found = call(stages[stage], stages["inputs"]), call(model, inputs)
    assert found.dtype == dtype
    close = {torch.bfloat16: 0.1, torch.float64: 1e-4}[dtype]
    assert float((found.double() - reference.double()).abs().max() / reference.abs().max()) < close


@STAGES
def test_meta_device(stages: dict[str, Any], stage: str) -> None:
    model = copy.deepcopy(stages[stage]).to("meta")
    inputs = stages["inputs"]
    hollow = {k: v.to("meta") for k, v in inputs.items()} if isinstance(inputs, dict) else inputs.to("meta")
    assert call(model, hollow).shape == call(stages[stage], inputs).shape


@pytest.mark.parametrize(
    ("name", "options"), [("test_resnet", {}), ("test_efficientnet", {}), ("test_convnext", {"ls_init_value": 1.0})]
)
def test_feature_pyramids(name: str, options: dict[str, Any]) -> None:
    """Several outputs, and layers of the original model that are left out."""
    check_chain(timm_model(name, features_only=True, **options), torch.randn(SIZE), when="always")


def test_lists_and_dicts_of_modules() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
            self.acts = nn.ModuleDict({"a": nn.ReLU(), "b": nn.GELU()})

        def forward(self, batch: dict[str, Tensor], options: list[Tensor]) -> dict[str, Tensor]:
            x = self.acts["a"](self.layers[0](batch["x"]))
            x = self.acts["b"](self.layers[1](x))
            return {"y": self.layers[2](x) + options[0]}

    torch.manual_seed(0)
    check_chain(Net(), ({"x": torch.randn(2, 6)}, [torch.randn(2, 6)]), when="always")


def test_quantized_layers_are_boundaries() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantized = torch.ao.quantization.quantize_dynamic(model, {"4": torch.ao.quantization.default_dynamic_qconfig})
    x = torch.randn(3, 8)
    gated = linearize.convert(quantized, x)
    assert torch.equal(gated(x), quantized(x))
    randomize(gated, 0.5)
    collapsed = linearize.collapse(gated)
    torch.testing.assert_close(collapsed(x), gated(x), rtol=1e-5, atol=1e-6)
    rows = {row.name: row for row in linearize.summary(gated).sites}
    assert rows["1"].reason is None
    assert rows["3"].reason


def remembered(method: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A cache inside a wrapper, as transformers has it."""
    inner = functools.lru_cache(maxsize=2)(method)

    @functools.wraps(method)
    def wrapper(*args: Any) -> Tensor:
        return inner(*args)

    return wrapper


@functools.cache
def beside(width: int) -> Tensor:
    return torch.full((width,), 0.5)


@functools.cache
def remembered_settings() -> dict[str, list[int]]:
    return {"sizes": [1, 2]}


class Remembering(nn.Module):
    """Results are remembered on the class, in a wrapper, on the object, and by a function beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4)

    @functools.lru_cache(maxsize=2)  # noqa: B019 - what users do
    def table(self, length: int) -> Tensor:
        return torch.arange(length, dtype=torch.float32)[:, None]

    def forward(self, x: Tensor) -> Tensor:
        if not hasattr(self, "_remembered"):
            self._remembered = functools.lru_cache(maxsize=2)(self._scale)
        y: Tensor = self.down(torch.relu(self.up(x + self.table(x.shape[1]))))
        return y * self._remembered(x.shape[2]) + self.shift(x.shape[2]) + beside(x.shape[2])

    @staticmethod
    @remembered
    def shift(width: int) -> Tensor:
        return torch.full((width,), 3.0)

    def _scale(self, width: int) -> Tensor:
        return torch.full((width,), 2.0)


@pytest.mark.parametrize("ran_before", [False, True])
def test_what_methods_remember_stays_real(ran_before: bool) -> None:
    model, x = Remembering().eval(), torch.randn(2, 3, 4)
    expected = model(x) if ran_before else None
    settings = remembered_settings()
    gated = linearize.convert(model, x)
    small = linearize.collapse(gated)
    linearize.summary(model, x)
    expected = model(x) if expected is None else expected
    assert remembered_settings() is settings  # no tensor in it: nothing to fear
    for each in (model, gated, small):
        assert type(each(x)) is Tensor
        assert torch.equal(each(x), expected)
