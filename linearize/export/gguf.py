"""GGUF: Llama-like decoders and BERT encoders for llama.cpp, run in llama.cpp itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from linearize.export import gguf_encoder as encoder
from linearize.export.face import Means, Proof, Refusal, Subject
from linearize.export.llamacpp import prove, prove_states
from linearize.export.plain import floating_types
from linearize.export.vocabulary import add_vocabulary, check_tokenizer
from linearize.zoo.decoders import DecoderLayer, DecoderWeights, read_decoder
from linearize.zoo.encoders import is_encoder, read_encoder
from linearize.zoo.unlike import Unlike

__all__ = ["Gguf"]

_NAMES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
_TURNED = ("llama", "deci")  # architectures whose rotation takes neighbouring features, not halves


class Gguf:
    """One .gguf file: `llama` or `qwen` where all layers are alike, `deci` where they are not; `bert` for encoders."""

    name = "gguf"
    suffix = ".gguf"
    writes: Mapping[str, str] = {"gguf": "gguf"}
    runs: Mapping[str, str] = {"xllamacpp": "gguf"}
    means = Means(own_layers=False, modules=False, round_to=32)
    # In float32 llama.cpp is asked for float32 throughout; else it rounds what it multiplies.
    tolerances: Mapping[torch.dtype, float] = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
    options: tuple[str, ...] = ("tokenizer",)
    library = "llama.cpp"
    near: tuple[str, ...] = ("remote", "onnx", "openvino", "pt2")
    fixed = False

    def can(self, model: nn.Module) -> Refusal | None:
        """Decoders and encoders that llama.cpp builds from their numbers."""
        try:
            if is_encoder(model):
                encoder.check_widths(read_encoder(model))
            else:
                architecture_of(_read(model))
        except Unlike as error:
            return Refusal(error.where, error.why)
        kinds = floating_types(model)
        if len(kinds) > 1 or kinds[0] not in _TYPES:
            return Refusal(type(model).__name__, f"has parameters of {', '.join(map(str, kinds))}")
        return None

    def write(self, subject: Subject, path: Path) -> Mapping[str, Any]:
        """Numbers, vocabulary, tensors."""
        import gguf

        encoded = read_encoder(subject.model) if is_encoder(subject.model) else None
        decoder = _read(subject.model) if encoded is None else None
        architecture = encoder.NAME if decoder is None else architecture_of(decoder)
        tokenizer = subject.options.get("tokenizer")
        writer = gguf.GGUFWriter(str(path), architecture)
        kind = floating_types(subject.model)[0]
        writer.add_name(type(subject.model).__name__)
        writer.add_file_type(int(getattr(gguf.LlamaFileType, _TYPES[kind])))
        read: Any = decoder or encoded
        if decoder is not None:
            _add_numbers(writer, decoder, architecture)
            tensors, widths = _tensors(decoder, architecture), [layer.width for layer in decoder.layers]
        else:
            encoder.add_numbers(writer, read)
            tensors, widths = list(read.tensors.items()), list(read.widths)
        words = read.tensors["token_embd.weight"].shape[0]
        told = add_vocabulary(writer, tokenizer, words, read.config, pieces=encoded is not None)
        for name, tensor in tensors:
            _add_tensor(writer, name, tensor, kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        alike = len(set(widths)) == 1
        return {
            "architecture": architecture,
            "weights": str(kind).removeprefix("torch."),
            "FFN widths": widths[0] if alike else ", ".join(map(str, widths)),
            "vocabulary": told,
            **({} if encoded is None else {"outputs": "states of all tokens, as token type 0; a pooler is left out"}),
        }

    def check(self, subject: Subject, path: Path) -> Proof:
        """Logits of prompts and of what llama.cpp makes of them, and the tokens that it picks."""
        check_tokenizer(path, subject.options.get("tokenizer"))
        return prove_states(subject, path, encoder.ALLOWED) if is_encoder(subject.model) else prove(subject, path)

    def usage(self, model: nn.Module) -> str:
        """A program that loads the file."""
        lines = ["import xllamacpp", "", "params = xllamacpp.CommonParams()", "params.model.path = 'NAME'"]
        if is_encoder(model):
            lines += ["params.embedding = True"]
            lines += ["params.pooling_type = xllamacpp.llama_pooling_type.LLAMA_POOLING_TYPE_MEAN"]
        return "\n".join((*lines, "server = xllamacpp.Server(params)"))


_TYPES = {torch.float32: "ALL_F32", torch.float16: "MOSTLY_F16", torch.bfloat16: "MOSTLY_BF16"}


def _read(model: nn.Module) -> DecoderWeights:
    """The decoder without layers that do nothing."""
    decoder = read_decoder(model)
    layers = tuple(layer for layer in decoder.layers if layer.width or layer.attention != "none")
    if not layers:
        raise Unlike("model.layers", "do nothing")
    return replace(decoder, layers=layers)


def architecture_of(decoder: DecoderWeights) -> str:
    """The name of the architecture in llama.cpp that computes what the decoder does.

    Raises:
        Unlike: there is none.
    """
    name = _NAMES[decoder.kind]
    odd = decoder.uneven or next((layer.path for layer in decoder.layers if layer.attention != "full"), "")
    for layer in decoder.layers:
        if not layer.width:
            # There llama.cpp leaves the layer as soon as it sees that there is no FFN: the attention would be lost.
            raise Unlike(f"{layer.path}.mlp", "is gone while the attention before it is there")
        if odd and any(name.endswith("_norm.weight") and name[:6] in ("attn_q", "attn_k") for name in layer.tensors):
            raise Unlike(odd, "differs from the first layer, and keys are normed")
        biased = [role for role in layer.biased if name.startswith("qwen") and not odd and role not in _QKV]
        if biased:
            name = "deci"  # which reads a bias wherever there is one
        if biased and any(part.startswith("attn_q_norm") for part in layer.tensors):
            raise Unlike(f"{layer.path}.mlp", "has a bias")
    return "deci" if odd else name


_QKV = ("attn_q", "attn_k", "attn_v")


def _add_numbers(writer: Any, decoder: DecoderWeights, architecture: str) -> None:
    config, layers = decoder.config, decoder.layers
    odd = architecture == "deci"
    writer.add_block_count(len(layers))
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    # A matrix in the place of attention is told by heads without keys.
    heads = [max(layer.heads, 1) if layer.attention == "map" else layer.heads for layer in layers]
    writer.add_feed_forward_length([layer.width for layer in layers] if odd else layers[0].width)
    writer.add_head_count(heads if odd else heads[0])
    writer.add_head_count_kv([layer.groups for layer in layers] if odd else layers[0].groups)
    writer.add_key_length(decoder.head_dim)
    writer.add_value_length(decoder.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(float(config.rope_parameters["rope_theta"]))
    writer.add_rope_dimension_count(2 * decoder.rotary.numel())
    writer.add_vocab_size(decoder.tensors["token_embd.weight"].shape[0])


def _tensors(decoder: DecoderWeights, architecture: str) -> list[tuple[str, Tensor]]:
    found = list(decoder.tensors.items())
    factors = _factors(decoder)
    if factors is not None:
        found.append(("rope_freqs.weight", factors))
    for i, layer in enumerate(decoder.layers):
        for name, tensor in layer.tensors.items():
            found.append((f"blk.{i}.{name}", _turned(name, tensor, layer) if architecture in _TURNED else tensor))
    return found


def _factors(decoder: DecoderWeights) -> Tensor | None:
    """The numbers that divide the angles of rotation; None if the angles are the ordinary ones."""
    n = decoder.rotary.numel()
    base = float(decoder.config.rope_parameters["rope_theta"])
    plain = base ** -(torch.arange(n, dtype=torch.float64) / n)
    factors = plain / decoder.rotary.cpu()
    return None if torch.allclose(factors, torch.ones_like(factors), rtol=1e-5) else factors.float()


def _turned(name: str, tensor: Tensor, layer: DecoderLayer) -> Tensor:
    """Rows of queries and keys in the order in which features that are rotated together are neighbours."""
    role, _, _ = name.partition(".")
    if role not in ("attn_q", "attn_k"):
        return tensor
    heads = layer.heads if role == "attn_q" else layer.groups
    rows = tensor.shape[0] // heads // 2
    return tensor.reshape(heads, 2, rows, *tensor.shape[1:]).swapaxes(1, 2).reshape(tensor.shape)


def _add_tensor(writer: Any, name: str, tensor: Tensor, kind: torch.dtype) -> None:
    """The tensor in the model's type; what is no matrix in float32, as llama.cpp wants it."""
    import gguf

    value = tensor.detach().cpu().contiguous()
    if value.dim() < 2 or kind == torch.float32:
        writer.add_tensor(name, value.float().numpy())
    elif kind == torch.float16:
        writer.add_tensor(name, value.numpy())
    else:
        raw = value.view(torch.uint8).numpy()
        writer.add_tensor(name, raw, raw_dtype=gguf.GGMLQuantizationType.BF16)
