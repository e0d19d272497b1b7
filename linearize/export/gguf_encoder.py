"""GGUF of BERT encoders: the numbers and tensors that llama.cpp reads under the name `bert`."""

from __future__ import annotations

from typing import Any

from linearize.zoo.encoders import EncoderWeights
from linearize.zoo.unlike import Unlike

__all__ = ["ALLOWED", "NAME", "add_numbers", "check_widths"]

ALLOWED = 1e-2
"""Relative error of an encoder: llama.cpp takes GELU from a table in float16, by its tanh form."""

NAME = "bert"
"""Of the architecture."""


def check_widths(encoder: EncoderWeights) -> None:
    """See that one number tells the width of all layers.

    Raises:
        Unlike: a layer has another than the first.
    """
    for i, width in enumerate(encoder.widths):
        if width != encoder.widths[0]:
            found = f"has width {width}, and the first layer {encoder.widths[0]}; llama.cpp reads one width for all"
            raise Unlike(f"encoder.layer.{i}.intermediate.dense", f"{found} (compress with uniform=True)")


def add_numbers(writer: Any, encoder: EncoderWeights) -> None:
    """The sizes of an encoder, and that it attends both ways; states of all tokens, not pooled."""
    import gguf

    config = encoder.config
    writer.add_block_count(len(encoder.widths))
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(encoder.widths[0])
    writer.add_head_count(config.num_attention_heads)
    writer.add_layer_norm_eps(config.layer_norm_eps)
    writer.add_causal_attention(value=False)
    writer.add_pooling_type(gguf.PoolingType.NONE)
    writer.add_vocab_size(config.vocab_size)
    writer.add_token_type_count(config.type_vocab_size)
