"""`save_pretrained` of changed models: no folder that loads as another function."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import linearize
from linearize.checkpoint import FILE
from linearize.errors import CheckpointError

transformers = pytest.importorskip("transformers")
IDS = torch.randint(3, 90, (2, 9), generator=torch.Generator().manual_seed(0))
SMALL = {"hidden_size": 16, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 99}


def bert() -> Any:
    torch.manual_seed(0)
    return transformers.BertModel(transformers.BertConfig(**SMALL, initializer_range=0.2)).eval()


def gated(model: nn.Module, share: float = 0.6, **options: Any) -> Any:
    made = linearize.convert(model, {"input_ids": IDS}, **options)
    for gate in linearize.gates(made).values():
        gate.linearize_(torch.arange(gate.channels) < share * gate.channels)
    return made


def first(output: Any) -> Tensor:
    return next(value for value in output.values() if isinstance(value, Tensor))


# A gated model; merged maps; a partial activation alone, whose folder is that of the original but for a buffer.
CHANGED: dict[str, Callable[[], Any]] = {
    "gated": lambda: gated(bert()),
    "collapsed": lambda: linearize.collapse(gated(bert()), when="always"),
    "partial": lambda: linearize.collapse(gated(bert(), include="pooler*")),
    "vanished": lambda: linearize.collapse(gated(bert(), 1.0, include="encoder*")),
    "copied": lambda: copy.deepcopy(linearize.collapse(gated(bert()))),
    "pickled": lambda: pickle.loads(pickle.dumps(linearize.collapse(gated(bert())))),  # noqa: S301
}


@pytest.mark.parametrize("kind", CHANGED)
def test_the_folder_is_for_linearize_alone(kind: str, tmp_path: Path) -> None:
    model: Any = CHANGED[kind]()
    config = model.config.to_dict()
    with pytest.warns(UserWarning, match=r"linearize\.load"):
        model.save_pretrained(tmp_path)
    for loader in (transformers.AutoModel, transformers.BertModel, transformers.AutoConfig):
        with pytest.raises(Exception, match=r"linearize\.load"):
            loader.from_pretrained(tmp_path)
    again: Any = linearize.load(tmp_path)
    assert type(again) is type(model) is transformers.BertModel
    torch.testing.assert_close(first(again(IDS)), first(model(IDS)), rtol=1e-5, atol=1e-6)
    assert model.config.to_dict() == config | {"dtype": model.config.dtype, "architectures": ["BertModel"]}
    assert sorted(file.name for file in tmp_path.iterdir()) == ["README.md", "config.json", FILE]


def test_the_card_is_for_a_hub(tmp_path: Path) -> None:
    """What loads the folder, and what it was made from; a card of the user's stays."""
    model: Any = CHANGED["collapsed"]()
    model.config._name_or_path = "someone/their-bert"
    with pytest.warns(UserWarning, match=r"linearize\.load"):
        model.save_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert text.startswith("---\nlibrary_name: linearize\nbase_model: someone/their-bert\ntags: [linearize]\n---\n")
    assert "linearize.load(" in text
    (tmp_path / "README.md").write_text("mine")
    with pytest.warns(UserWarning, match=r"linearize\.load"):
        model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"


def test_over_an_older_folder(tmp_path: Path) -> None:
    """The weights of the original do not stay there, or a marked configuration would be all that keeps them apart."""
    model = bert()
    model.save_pretrained(tmp_path)
    (tmp_path / "notes.bin").write_bytes(b"mine")
    with pytest.warns(UserWarning, match=r"linearize\.load"):
        gated(model).save_pretrained(tmp_path)
    assert not (tmp_path / "model.safetensors").exists()
    assert (tmp_path / "notes.bin").read_bytes() == b"mine"
    assert json.loads((tmp_path / "config.json").read_text())["hidden_size"] == 16


def test_the_original_is_saved_as_ever(tmp_path: Path) -> None:
    model = bert()
    gated(model)
    model.save_pretrained(tmp_path)
    again = transformers.AutoModel.from_pretrained(tmp_path)
    torch.testing.assert_close(first(again(IDS)), first(model(IDS)))


def test_nothing_collapsed_is_saved_as_ever(tmp_path: Path) -> None:
    model: Any = linearize.collapse(linearize.convert(bert(), {"input_ids": IDS}))
    model.save_pretrained(tmp_path)
    again = transformers.AutoModel.from_pretrained(tmp_path)
    torch.testing.assert_close(first(again(IDS)), first(model(IDS)))


@pytest.mark.parametrize("given", [False, True], ids=["state_dict=None", "state_dict"])
def test_a_trainers_checkpoint_goes_on_and_loads_nowhere_else(given: bool, tmp_path: Path) -> None:
    """A trainer hands over the weights itself, and reads them back into the model that it has."""
    model = gated(bert())
    with pytest.warns(UserWarning, match="load_state_dict"):
        model.save_pretrained(tmp_path, state_dict=model.state_dict() if given else None)
    for overridden in ({}, {"attn_implementation": "eager"}):
        for loader in (transformers.BertModel, transformers.AutoModel):
            with pytest.raises(Exception, match=r"linearize\.load"):
                loader.from_pretrained(tmp_path, **overridden)
    with pytest.raises(CheckpointError, match=r"folder without linearize.safetensors.*load_state_dict"):
        linearize.load(tmp_path)
    from safetensors.torch import load_file

    other = gated(bert())
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    _, unexpected = other.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=False)
    assert not unexpected
    assert torch.equal(first(other(IDS)), first(model(IDS)))


def test_no_upload_at_once(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="upload that folder"):
        gated(bert()).save_pretrained(tmp_path, push_to_hub=True)
    assert list(tmp_path.iterdir()) == []


def test_a_part_that_another_library_saves(tmp_path: Path) -> None:
    """As in a SentenceTransformer: the model with a configuration is a part of the one that was converted."""

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model, self.head = bert(), nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))

        def forward(self, input_ids: Tensor) -> Tensor:
            return self.head(self.model(input_ids).last_hidden_state.mean(1))

    small: Any = linearize.collapse(gated(Encoder().eval(), 1.0))
    with pytest.warns(UserWarning, match=r"linearize\.save"):
        small.model.save_pretrained(tmp_path)
    with pytest.raises(Exception, match=r"linearize\.load"):
        transformers.AutoModel.from_pretrained(tmp_path)


def test_hub_mixin(tmp_path: Path) -> None:
    """Its from_pretrained is not strict: a gated model would come back as the original, without a word."""
    hub: Any = pytest.importorskip("huggingface_hub")

    class Net(nn.Module, hub.PyTorchModelHubMixin):  # type: ignore[misc]
        def __init__(self, width: int = 16) -> None:
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 3))

        def forward(self, x: Tensor) -> Tensor:
            return self.layers(x)

    torch.manual_seed(0)
    x, model = torch.randn(5, 4), Net().eval()
    changed: Any = linearize.convert(model, x)
    linearize.gates(changed)["layers.1"].linearize_(torch.arange(16) < 9)
    assert not torch.allclose(changed(x), model(x)), "negative control"
    with pytest.warns(UserWarning, match=r"linearize\.load"):
        changed.save_pretrained(tmp_path)
    with pytest.raises(Exception, match=r"model\.safetensors"):
        Net.from_pretrained(tmp_path)
    torch.testing.assert_close(linearize.load(tmp_path, model=Net())(x), changed(x))
    card = hub.ModelCard.load(tmp_path / "README.md")  # as a hub reads it
    assert card.data.library_name == "linearize"
    assert "Pass model= for a class of your own" in card.text
    assert not list(tmp_path.glob("model*.safetensors")), "our format is not under the name of another"


def test_a_rewritten_model_can_still_be_pickled(tmp_path: Path) -> None:
    made = gated(transformers.RobertaForSequenceClassification(transformers.RobertaConfig(**SMALL)).eval())
    again = pickle.loads(pickle.dumps(made))  # noqa: S301
    torch.testing.assert_close(first(again(IDS)), first(made(IDS)))
    assert again.save_pretrained.module is again
