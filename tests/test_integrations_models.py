"""Models of sentence-transformers and diffusers, through those libraries' own folders and pipelines."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import linearize
from linearize.checkpoint import FILE
from linearize.errors import CheckpointError, UsageError
from linearize.gating.gate import gates
from linearize.integrations import sentence_module

LARGE = "large: in the extra `pipelines` only"
SENTENCES = ["the cat sat on the mat", "a dog", "the dog sat on a cat and the mat"]


def some_linear(gated: nn.Module, share: float = 0.6) -> nn.Module:
    for gate in gates(gated).values():
        gate.linearize_(torch.rand(gate.channels) < share)
    return linearize.collapse(gated, when="always")


# ------------------------------------------------------------------------------------------- sentence-transformers


def encoder(folder: Path) -> Any:
    """A small encoder as the library makes it of a transformers folder."""
    pytest.importorskip("sentence_transformers", reason=LARGE)
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder.mkdir()
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *sorted({w for text in SENTENCES for w in text.split()})]
    (folder / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast(vocab_file=str(folder / "vocab.txt")).save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(words), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
        max_position_embeddings=32, hidden_act="relu",
    )  # fmt: skip
    BertModel(config).eval().save_pretrained(folder)
    first = Transformer(str(folder))
    return SentenceTransformer(modules=[first, Pooling(first.get_embedding_dimension())], device="cpu")


@pytest.mark.filterwarnings("ignore")
def test_sentence_transformers(tmp_path: Path) -> None:
    """Its module in, a folder out that it loads; `encode` is the same all along the way."""
    sentence = pytest.importorskip("sentence_transformers", reason=LARGE)
    from transformers import BertModel

    made = encoder(tmp_path / "base")
    before = made.encode(SENTENCES)
    batch = made.preprocess(SENTENCES)
    batch = {name: batch[name] for name in ("input_ids", "attention_mask")}
    gated = linearize.convert(made[0].auto_model, batch)
    small = some_linear(gated)
    made[0].model = gated
    expected = made.encode(SENTENCES)
    assert abs(expected - before).max() > 1e-3, "channels are linear"

    made[0] = sentence_module(made[0], small)
    assert abs(made.encode(SENTENCES) - expected).max() < 1e-5
    made.save(str(tmp_path / "small"))
    names = {path.name for path in (tmp_path / "small").iterdir()}
    assert FILE in names
    assert "model.safetensors" not in names, "transformers must find no weights that it would take for another function"
    modules = json.loads((tmp_path / "small" / "modules.json").read_text())
    assert modules[0]["type"] == "linearize.integrations.sentences.LinearizedTransformer"

    again = sentence.SentenceTransformer(str(tmp_path / "small"), device="cpu", trust_remote_code=True)
    own, read = small.state_dict(), again[0].auto_model.state_dict()
    assert own.keys() == read.keys()
    assert all(torch.equal(value, read[name]) for name, value in own.items())
    assert abs(again.encode(SENTENCES) - made.encode(SENTENCES)).max() < 1e-5  # memory may be aligned otherwise
    assert again.max_seq_length == made.max_seq_length
    again.save(str(tmp_path / "again"))  # and once more
    third = sentence.SentenceTransformer(str(tmp_path / "again"), device="cpu", trust_remote_code=True)
    assert abs(third.encode(SENTENCES) - made.encode(SENTENCES)).max() < 1e-5

    with pytest.raises(OSError, match="no file named"):
        BertModel.from_pretrained(tmp_path / "small")
    (tmp_path / "again" / FILE).unlink()
    with pytest.raises(CheckpointError, match=r"found no linearize\.safetensors"):
        sentence.SentenceTransformer(str(tmp_path / "again"), device="cpu", trust_remote_code=True)
    with pytest.raises(UsageError, match=r"encoder\[0\]"):
        sentence_module(made[1], small)


# ------------------------------------------------------------------------------------------------------- diffusers


def unet() -> tuple[nn.Module, dict[str, Tensor]]:
    diffusers = pytest.importorskip("diffusers", reason=LARGE)
    torch.manual_seed(0)
    model = diffusers.UNet2DModel(
        sample_size=8, in_channels=3, out_channels=3, layers_per_block=1, block_out_channels=(8,), norm_num_groups=4,
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), add_attention=False,
    )  # fmt: skip
    return model.eval(), {"sample": torch.randn(4, 3, 8, 8), "timestep": torch.tensor([3, 7, 1, 9])}


def dit() -> tuple[nn.Module, dict[str, Tensor]]:
    diffusers = pytest.importorskip("diffusers", reason=LARGE)
    torch.manual_seed(0)
    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4, num_layers=1, sample_size=8,
        patch_size=2, num_embeds_ada_norm=10,
    )  # fmt: skip
    labels = torch.tensor([1, 2, 5, 7])
    inputs = {"hidden_states": torch.randn(4, 4, 8, 8), "timestep": torch.tensor([3, 7, 1, 9]), "class_labels": labels}
    return model.eval(), inputs


def run_pipeline(model: Any) -> Tensor:
    """Two steps of the library's own pipeline."""
    import diffusers

    drawn = torch.Generator().manual_seed(0)
    scheduler = diffusers.DDIMScheduler(num_train_timesteps=10)
    if isinstance(model, diffusers.UNet2DModel):
        pipe = diffusers.DDIMPipeline(unet=model, scheduler=scheduler)
        pipe.set_progress_bar_config(disable=True)
        found = pipe(batch_size=1, generator=drawn, num_inference_steps=2, output_type="np").images
    else:
        torch.manual_seed(1)
        vae = diffusers.AutoencoderKL(
            block_out_channels=(4,), norm_num_groups=4, latent_channels=4, layers_per_block=1, sample_size=8
        ).eval()
        pipe = diffusers.DiTPipeline(transformer=model, vae=vae, scheduler=scheduler)
        pipe.set_progress_bar_config(disable=True)
        found = pipe([1], guidance_scale=1.0, generator=drawn, num_inference_steps=2, output_type="np").images
    return torch.as_tensor(found)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make", [unet, dit])
def test_diffusers(make: Any, tmp_path: Path) -> None:
    """Converted bitwise, compressed by flops, run by the library's own pipeline, saved and loaded."""
    model, inputs = make()
    before = copy.deepcopy(model.state_dict())
    gated = linearize.convert(model, inputs)
    with torch.no_grad():
        assert torch.equal(gated(**inputs)[0], model(**inputs)[0])
    result = linearize.compress(model, [inputs] * 2, flops=0.85, progress=False, cache=False, rounds=1)
    assert result.report.after.flops <= 0.85 * result.report.before.flops
    assert bool(result.report.verification)
    assert type(result.model) is type(model)
    images = run_pipeline(result.model)
    assert bool(images.isfinite().all())
    assert images.shape == run_pipeline(model).shape
    assert not torch.equal(images, run_pipeline(model))
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())
    linearize.save(result.model, tmp_path / "small.safetensors")
    loaded = linearize.load(tmp_path / "small.safetensors", model=make()[0])
    own, read = result.model.state_dict(), loaded.state_dict()
    assert own.keys() == read.keys()
    assert all(torch.equal(value, read[name]) for name, value in own.items())
    assert linearize.verify(result.model, loaded, [inputs]).passed
