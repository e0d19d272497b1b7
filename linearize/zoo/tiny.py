"""Tiny transformers models of any type: configurations derived from the library's own, sized down by role.

What a number in a configuration means is read from its name: a width, a number of layers, of heads, of experts, a
vocabulary, an image's side. Equal roles get equal sizes, so that what must match still does, also across the parts
of a composed model. Where that fails, gentler levels shrink less.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from linearize.errors import UsageError

LEVELS = 5
"""0 shrinks all roles; 1, 2 keep images, positions, lists, heads' widths; 3 shrinks depth and experts; 4 nothing."""

# Widths, inner widths and heads by level.
SIZES = ((64, 128, 4), (256, 256, 2), (256, 256, 4), (0, 0, 0), (0, 0, 0))
HEAD_DIM, RANK, LAYERS, EXPERTS, VOCABULARY = 16, 16, 2, 4, 256
POSITIONS, PATCHES, FIRST_TOKEN = 512, 4, 100

_ROLES: dict[str, str] = {
    "scale": r"(width|depth)_(coefficient|multiplier)",
    "upsampling": r"upsample_groups",
    "expert_groups": r"n_group|num_expert_group",
    "active_groups": r"topk_group",
    "keep": r".*(kernel|stride|dilation|dropout|_rate$|ratio|groups?$|num_labels|pretraining_tp|_layer_id|"
    r"layers_per|every_n|type_vocab|feature_size|mel_|classifier_proj|num_feat_extract).*|vision_feature_layer|"
    r"query_dim",
    "few_layers": r"first_k_dense_replace|num_dense_layers|max_window_layers|num_nextn_predict_layers",
    "no_layers": r"num_kv_shared_layers",
    "indices": r".*(out_indices|attn_indexes|block_indexes|visual_indexes|layers_indices|hook_ids|extract_layers|"
    r"spatial_target_layers)",
    "layers": r".*(num|n|encoder|decoder|l|x|r)_(hidden_|encoder_|decoder_)?layers?|layers|depth|.*_depth|n_layers?|"
    r".*_num_layers|num_.*_layers|num_(encoder_|attention_)?blocks",
    "depths": r"depths|n_attn_blocks|num_block_repeats",
    "layer_kinds": r"attention_types",
    "mamba_heads": r"mamba_(n|num)_heads",
    "kv_heads": r".*(num_key_value_heads|num_kv_heads|num_query_groups)",
    "heads": r".*(num_attention_heads|attention_heads|num_heads|n_heads?|resampler_heads|linear_num_key_heads|"
    r"linear_num_value_heads|linear_num_heads)",
    "rope_dim": r"qk_rope_head_dim|rotary_dim",
    "qk_dim": r"qk_head_dim",
    "head_dim": r".*(head_dim|dim_head|d_kv|d_head|kv_channels|head_size|qk_nope_head_dim|v_head_dim)",
    "rank": r".*(lora_rank|_rank)",
    "active_experts": r".*(experts_per_tok(en)?|moe_topk|moe_k|top_k_experts)",
    "experts": r".*(num_(local_|routed_)?experts|n_routed_experts|moe_num_experts|zero_expert_num)",
    "vocabulary": r".*vocab_size(_per_layer_input)?|.*_group_vocab",
    "positions": r"(max_position_embeddings|n_positions|n_ctx|max_seq_len|max_target_positions|seq_len|"
    r"model_max_length|max_(en|de)coder_position_embeddings|context_length)",
    "frames": r"max_source_positions",
    "image": r"image_size|img_size|pretrain_image_size",
    "inner": r".*(intermediate_size|ffn_dim|d_ff|dff|n_inner|mlp_dim|intermediate_dim|feedforward_dim|ffn_hidden_size|"
    r"dim_feedforward|dim_ff|feed_forward_hidden_size|feed_forward_size|d_inner)(_mlp)?",
    "width": r".*(hidden_size|hidden_dim|d_model|n_embd|embed_dim|emb_dim|embedding_dim|embedding_size|embed_size|"
    r"projection_dim|projection_size|pooler_output_size|output_dim|project_dim|proj_dim|fpn_feature_size|"
    r"mask_feature_size|mask_dim|hidden_sizes|embed_dims|out_features|conv_dim|tdnn_dim|in_channels|out_channels|"
    r"num_pos_feats|lru_width|codevector_dim|latents|text_encoder_width|channels_list|channel_list|_dims|"
    r"num_filters|downsample_channels|enc_channels|d_latents|base_channels)",
}
_REQUIRED: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "head_dim": HEAD_DIM,
    "prediction_length": 4,
    "mask_token_id": 3,
    "pad_token_id": 1,
    "image_token_index": 5,
    "moe_intermediate_size": 64,
    "n_routed_experts": EXPERTS,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "vocabulary_map": {"<image>": 4, "<|extra_200|>": 5, "<|visual token 000000|>": 6, "IMGIMGAZ": 7},
}
"""Settings that some types leave unset, and need."""

_TOKEN = re.compile(r"(?!.*ignore).*(token_ids?|token_index|_pad_id|_bos_id|_eos_id|_start_id|_end_id)")
_NAMES_DERIVED = {"stage_names", "layer_types", "layers_block_type", "dtype", "mlp_layer_types"}
_LEVEL_ROLES = (
    frozenset(_ROLES) - {"keep"},
    *(2 * [frozenset(_ROLES) - {"keep", "positions", "image", "frames", "head_dim", "rope_dim", "qk_dim", "rank"}]),
    frozenset({"layers", "few_layers", "depths", "experts", "active_experts", "expert_groups", "active_groups"}),
    frozenset[str](),
)


def tiny_config(model_type: str, level: int = 0) -> Any:
    """A small configuration of a transformers model type.

    Args:
        model_type: a key of transformers' ``CONFIG_MAPPING``.
        level: how gentle to be, 0 to ``LEVELS - 1``.

    Raises:
        UsageError: there is no such type, or its configuration cannot be made from defaults, or not that small.

    Examples:
        >>> config = tiny_config("bert")
        >>> config.hidden_size, config.num_hidden_layers, config.num_attention_heads, config.vocab_size
        (64, 2, 4, 256)
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if model_type not in CONFIG_MAPPING:
        raise UsageError(model_type, "transformers has no such model type", "See transformers' CONFIG_MAPPING.")
    cls = CONFIG_MAPPING[model_type]
    try:
        return cls(**_Shrinker(level).overrides(cls()))
    except Exception as error:  # hundreds of classes, each with checks of its own
        found = f"no configuration of size level {level}: {type(error).__name__}: {error}"
        raise UsageError(model_type, found, "Try a gentler level.") from error


class _Shrinker:
    """Shrinks one configuration and its parts; token ids get the same new value wherever they stand."""

    def __init__(self, level: int) -> None:
        self.roles = _LEVEL_ROLES[level]
        self.width, self.inner, self.heads = SIZES[level]
        self.tokens: dict[int, int] = {}

    def overrides(self, config: Any, given: dict[str, Any] | None = None) -> dict[str, Any]:
        """The arguments that make a small configuration of the class of ``config``.

        Only what changes is passed: whatever the constructor derives from it, it shall derive again.
        """
        found = dict(given or {})
        specs = getattr(config, "sub_configs_defaults", None) or {}
        listed = any(isinstance(getattr(config, name, None), (list, tuple)) for name in ("num_heads", "depths"))
        for name, default in {**dict.fromkeys(found), **_fields(config)}.items():
            value = found[name] if name in found else _value(config, name)
            if hasattr(value, "to_dict"):
                spec = specs.get(name)
                same = getattr(spec, "model_type", None) == getattr(value, "model_type", "")
                own = (getattr(spec, "init_kwargs", None) or {}) if same else {}
                kwargs = {**_changed(value), **{key: item for key, item in own.items() if item is not None}}
                part = {"model_type": value.model_type} if getattr(value, "model_type", None) else {}
                found[name] = {**self.overrides(value, kwargs), **part}
                continue
            if value is None and name in _REQUIRED and self.roles:
                found[name] = _REQUIRED[name]
            if value is None and name == "layer_types" and "layers" in self.roles:
                found[name] = ["full_attention"] * LAYERS
            if isinstance(value, dict) and "mrope_section" in value and "head_dim" in self.roles:
                found[name] = {**value, "mrope_section": _sections(value["mrope_section"])}
            derived = default is None and name not in found and name != "attention_types"
            if value is None or isinstance(value, (bool, str, dict)) or derived:
                continue
            new = self._shrink(name, value, config, listed)
            if new != value:
                found[name] = new
        return found

    def _shrink(self, name: str, value: Any, config: Any, listed: bool) -> Any:
        if _TOKEN.fullmatch(name) and "vocabulary" in self.roles:
            return self._token(value)
        role = next((role for role, pattern in _ROLES.items() if re.fullmatch(pattern, name)), "keep")
        if role not in self.roles:
            return value
        if role == "scale" and isinstance(value, float):
            return min(value, 1.0)
        if role == "indices" and isinstance(value, (list, tuple)) and _depth(config):
            return type(value)(i if i < 0 else i * _layers(config) // _depth(config) for i in value)
        if isinstance(value, (list, tuple)):
            return _shrink_list(role, value, self.width == SIZES[0][0])
        if type(value) is not int or value <= 0:
            return value
        if role == "image":
            return _image_side(value, config)
        if listed and role in ("width", "inner"):
            return max(value // 8, 8) if value % 8 == 0 and self.width == SIZES[0][0] else value
        return self._shrink_number(role, value, config)

    def _shrink_number(self, role: str, value: int, config: Any) -> int:
        if role == "kv_heads":
            heads = next(
                (getattr(config, n) for n in ("num_attention_heads", "n_head") if getattr(config, n, 0)), value
            )
            return 1 if value == 1 else self.heads // 2 if isinstance(heads, int) and value < heads else self.heads
        targets = {
            "layers": _layers(config),
            "few_layers": 1,
            "no_layers": 0,
            "mamba_heads": self._mamba_heads(config),
            "heads": self._mamba_heads(config) if hasattr(config, "expand") else self.heads,
            "rope_dim": HEAD_DIM // 2,
            "qk_dim": HEAD_DIM + HEAD_DIM // 2,
            "head_dim": HEAD_DIM,
            "rank": RANK,
            "active_experts": 2,
            "expert_groups": 2,
            "active_groups": 1,
            "experts": EXPERTS,
            "vocabulary": VOCABULARY,
            "positions": POSITIONS,
            "frames": 32,
            "inner": self.inner,
            "width": self.width,
            "upsampling": self.width,
        }
        return min(value, targets.get(role, value))

    def _mamba_heads(self, config: Any) -> int:
        """Heads of a state space layer: they fill the expanded width."""
        size = HEAD_DIM
        if "head_dim" not in self.roles:
            names = ("mamba_d_head", "mamba_head_dim", "head_dim")
            size = next((value for name in names if isinstance(value := _value(config, name), int)), HEAD_DIM)
        expand = _value(config, "mamba_expand") or _value(config, "expand") or 2
        return max(int(expand * self.width) // size, 1)

    def _token(self, value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return type(value)(self._token(item) for item in value)
        if type(value) is not int or value < FIRST_TOKEN:
            return value
        return self.tokens.setdefault(value, FIRST_TOKEN + len(self.tokens))


def _fields(config: Any) -> dict[str, Any]:
    """Names and defaults of what the configuration's class declares."""
    if not dataclasses.is_dataclass(config):
        return {name: getattr(config, name) for name in config.to_dict()}
    return {field.name: field.default for field in dataclasses.fields(config) if not field.name.startswith("_")}


def _value(config: Any, name: str) -> Any:
    """A setting; None also where it differs from layer to layer and cannot be read as one."""
    try:
        return getattr(config, name, None)
    except Exception:  # configurations of some types refuse
        return None


def _sections(sections: Any) -> list[int]:
    """Parts of half a head for the axes of multimodal rotary embeddings, in the given proportions."""
    total = sum(sections)
    scaled = [max(1, HEAD_DIM // 2 * part // total) for part in sections]
    scaled[0] += HEAD_DIM // 2 - sum(scaled)
    return scaled


def _changed(config: Any) -> dict[str, Any]:
    """What a part of a composed configuration has other than its own class by default."""
    found = {}
    for name, default in _fields(config).items():
        value = _value(config, name)
        missing = isinstance(default, dataclasses._MISSING_TYPE)
        named = isinstance(value, str) or (isinstance(value, list) and all(isinstance(item, str) for item in value))
        if default is None or missing:
            # A derived value is left to the constructor; a name cannot be derived.
            if named and value and name not in _NAMES_DERIVED:
                found[name] = value
        elif value != default and (
            isinstance(value, (bool, int, float, str))
            or (isinstance(value, (list, tuple)) and isinstance(default, (list, tuple)))
        ):
            found[name] = value
    return found


def _shrink_list(role: str, value: Any, widths: bool) -> Any:
    numbers = all(type(item) is int for item in value)
    if role == "layer_kinds":  # [[[kind, ...], how often], ...]
        return [[kinds, 1] for kinds, _ in value]
    if role == "depths" and numbers:
        return type(value)(min(item, 2) for item in value)
    if role == "width" and widths and numbers and all(item % 8 == 0 and item >= 64 for item in value):
        return type(value)(item // 8 for item in value)
    if role == "image" and numbers:
        return type(value)(min(item, 64) for item in value)
    return value


def _image_side(value: int, config: Any) -> int:
    patch = getattr(config, "patch_size", None)
    patch = patch[-1] if isinstance(patch, (list, tuple)) and patch else patch
    if type(patch) is int and patch > 8:
        return min(value, PATCHES * patch)
    return min(value, 64)


def _depth(config: Any) -> int:
    """How many layers the configuration has; 0 if it does not say with one number."""
    found = _value(config, "num_hidden_layers") or _value(config, "depth")
    return found if isinstance(found, int) else 0


def _layers(config: Any) -> int:
    """As many layers as it takes to have one of each kind, where kinds alternate, or one per index that is used."""
    for name in ("out_indices", *_fields(config)):
        value = _value(config, name)
        if re.fullmatch(_ROLES["indices"], name) and isinstance(value, (list, tuple)) and _depth(config):
            return max(LAYERS, len(value))
    kinds = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None)
    if isinstance(kinds, (list, tuple)) and len(set(map(str, kinds))) > 1:
        last = max(list(kinds).index(kind) for kind in set(kinds))
        return max(LAYERS, min(last + 1, 8))
    return LAYERS
