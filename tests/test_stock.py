"""Stock copies: the config tells all widths, the weights are tied as they are, and the outputs are the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import linearize
from linearize.compress import compress
from linearize.errors import CheckpointError
from linearize.zoo import stock_copy
from linearize.zoo.stock_config import described, shapes_of
from tests.toys import QUIET

transformers = pytest.importorskip("transformers")
IDS = torch.randint(3, 90, (16, 12), generator=torch.Generator().manual_seed(0))
TEXT = {"hidden_size": 16, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 99}
SEQ2SEQ = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64,
           "encoder_attention_heads": 2, "decoder_attention_heads": 2, "vocab_size": 99}  # fmt: skip


def make(name: str, **options: Any) -> Any:
    torch.manual_seed(0)
    return getattr(transformers, name)(getattr(transformers, options.pop("config"))(**options)).eval()


def seq2seq() -> Any:
    return make("BartForConditionalGeneration", config="BartConfig", **SEQ2SEQ, max_position_embeddings=32)


def clip() -> Any:
    image = {**TEXT, "image_size": 16, "patch_size": 8}
    image.pop("vocab_size")
    return make("CLIPModel", config="CLIPConfig", text_config={**TEXT, "max_position_embeddings": 16},
                vision_config=image, projection_dim=8)  # fmt: skip


CASES: dict[str, Any] = {
    # A tanh in the head's forward, which is rewritten for a gate, and left alone.
    "rewritten": (lambda: make("RobertaForSequenceClassification", config="RobertaConfig", **TEXT, num_labels=3),
                  {"input_ids": IDS}, ("intermediate_size",)),
    "two numbers": (seq2seq, {"input_ids": IDS, "decoder_input_ids": IDS[:, :5]},
                    ("encoder_ffn_dim", "decoder_ffn_dim")),
    "nested": (clip, {"input_ids": IDS, "pixel_values": torch.randn(16, 3, 16, 16)},
               ("text_config.intermediate_size", "vision_config.intermediate_size")),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
@pytest.mark.slow
def test_a_compressed_model_loads_by_itself(name: str, tmp_path: Path) -> None:
    build, batch, places = CASES[name]
    model = build()
    small = compress(model, [batch] * 3, flops=0.8, stock=True, uniform=True, **QUIET).model
    made: Any = stock_copy(small)
    widths = []
    for place in places:
        value: Any = made.config
        for part in place.split("."):
            value = getattr(value, part)
        widths.append(value)
    assert all(0 < width < 64 for width in widths)
    made.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert linearize.verify(small, again, batch)
    assert not linearize.verify(model, again, batch), "negative control"


@pytest.mark.parametrize("kind", ["GPT2", "Llama"])
@pytest.mark.parametrize("tied", [False, True])
def test_a_head_that_was_untied_or_tied(kind: str, tied: bool) -> None:
    """In memory, as whoever trains a head of its own does; the config says the other thing."""
    more = {"n_embd": 16, "n_layer": 1, "n_head": 2} if kind == "GPT2" else {**TEXT, "num_key_value_heads": 2}
    name = f"{kind}LMHeadModel" if kind == "GPT2" else f"{kind}ForCausalLM"
    model = make(name, config=f"{kind}Config", **{**more, "vocab_size": 99}, tie_word_embeddings=not tied,
                 bos_token_id=0, eos_token_id=0)  # fmt: skip
    table = model.get_input_embeddings().weight
    model.lm_head.weight = table if tied else nn.Parameter(torch.randn_like(table))
    made: Any = stock_copy(model)
    assert made.config.tie_word_embeddings is tied
    assert (made.lm_head.weight is made.get_input_embeddings().weight) == tied
    assert model.config.tie_word_embeddings is not tied, "the model's own config stays"
    assert linearize.verify(model, made, {"input_ids": IDS})


def test_another_function_of_the_same_shapes_is_refused() -> None:
    model = make("BertModel", config="BertConfig", **TEXT, initializer_range=0.2)
    model.encoder.layer[0].intermediate.intermediate_act_fn = nn.ReLU()
    with pytest.raises(CheckpointError, match="computes something else"):
        stock_copy(model)


def test_what_no_config_says_is_refused_before_any_work() -> None:
    model = make("BertModel", config="BertConfig", **TEXT)
    layer = model.encoder.layer[0]
    layer.intermediate.dense, layer.output.dense = nn.Linear(16, 40), nn.Linear(40, 16)
    seen: list[str] = []
    with pytest.raises(CheckpointError, match="found no config"):
        compress(model, [{"input_ids": IDS}], flops=0.8, stock=True, **{**QUIET, "progress": seen.append})
    assert seen == []


def test_types_and_buffers_are_those_of_the_model() -> None:
    model = make("LlamaForCausalLM", config="LlamaConfig", **TEXT, num_key_value_heads=2).to(torch.bfloat16)
    model.model.norm.float()
    model.generation_config.max_new_tokens = 7
    made: Any = stock_copy(model.float())
    assert made.generation_config.max_new_tokens == 7
    half: Any = stock_copy(model.to(torch.bfloat16))
    assert [t.dtype for t in half.state_dict().values()] == [t.dtype for t in model.state_dict().values()]


def test_two_numbers_that_a_class_wants_equal() -> None:
    """Neither can change alone: the class refuses."""

    class Config:
        def __init__(self) -> None:
            self.first, self.second, self.other = 8, 8, 8

        def to_dict(self) -> dict[str, int]:
            return dict(vars(self))

    class Net(nn.Module):
        def __init__(self, config: Config) -> None:
            super().__init__()
            if config.first != config.second:
                raise ValueError("not equal")
            self.a, self.b = nn.Linear(4, config.first), nn.Linear(config.second, config.other)

    wanted = shapes_of(Net, Config()) | {"a.weight": (5, 4), "a.bias": (5,), "b.weight": (8, 5)}
    found = described(Net, Config(), wanted)
    assert vars(found) == {"first": 5, "second": 5, "other": 8}
    assert described(Net, Config(), wanted | {"b.weight": (8, 6)}) is None
