"""Kinds of ATen operations, by name, for the rules by which path lengths pass them."""

from __future__ import annotations

from typing import Any

from torch import fx

from linearize.graph.ops import ACTIVATIONS, ARITHMETIC

_MOVES = frozenset(
    (
        "view reshape _unsafe_view flatten unflatten squeeze unsqueeze permute transpose t swapaxes swapdims movedim "
        "moveaxis expand expand_as broadcast_to view_as reshape_as repeat tile slice narrow select unbind chunk split "
        "split_with_sizes tensor_split unsafe_split unsafe_chunk roll flip pixel_shuffle pixel_unshuffle "
        "channel_shuffle repeat_interleave unfold diagonal rot90 numpy_T mT"
    ).split()
)


_MERGES = (
    ACTIVATIONS
    | ARITHMETIC
    | frozenset(
        (
            "clone contiguous alias detach to _to_copy lift_fresh type_as dropout feature_dropout alpha_dropout "
            "addcmul addcdiv lerp masked_fill batch_norm layer_norm group_norm instance_norm rms_norm _fused_rms_norm "
            "cumsum cumprod tril triu nan_to_num remainder fmod floor ceil round trunc atan2 logaddexp sinh cosh log2 "
            "copy log10 exp2 logit renorm native_dropout complex real imag conj view_as_real view_as_complex"
        ).split()
    )
)


_SOFT = frozenset("softmax _softmax _safe_softmax log_softmax _log_softmax".split())


_REDUCTIONS = frozenset("mean sum amax amin max min prod std var norm linalg_vector_norm logsumexp nansum".split())


_CONSTANTS = frozenset(
    (
        "zeros_like ones_like full_like empty_like rand_like randn_like new_zeros new_ones new_full new_empty zeros "
        "ones full arange argmax argmin argsort sym_size size"
    ).split()
)


_ATTENTION = frozenset(
    (
        "scaled_dot_product_attention _scaled_dot_product_flash_attention "
        "_scaled_dot_product_efficient_attention _scaled_dot_product_flash_attention_for_cpu"
    ).split()
)


def arguments(node: fx.Node) -> dict[str, Any]:
    """The arguments of an op by the names of its schema."""
    names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
    return {**dict(zip(names, node.args, strict=False)), **node.kwargs}
