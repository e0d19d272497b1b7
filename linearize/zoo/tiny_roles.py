"""The meaning of the numbers in a configuration, read from their names, and their sizes in a tiny model."""

from __future__ import annotations

import re
from typing import Any

# Widths, inner widths and heads by level.
SIZES = ((64, 128, 4), (256, 256, 2), (256, 256, 4), (0, 0, 0), (0, 0, 0))


HEAD_DIM, RANK, LAYERS, EXPERTS, VOCABULARY = 16, 16, 2, 4, 256


POSITIONS, PATCHES, FIRST_TOKEN = 512, 4, 100


ROLES: dict[str, str] = {
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


REQUIRED: dict[str, Any] = {
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


TOKEN = re.compile(r"(?!.*ignore).*(token_ids?|token_index|_pad_id|_bos_id|_eos_id|_start_id|_end_id)")


NAMES_DERIVED = {"stage_names", "layer_types", "layers_block_type", "dtype", "mlp_layer_types"}


LEVEL_ROLES = (
    frozenset(ROLES) - {"keep"},
    *(2 * [frozenset(ROLES) - {"keep", "positions", "image", "frames", "head_dim", "rope_dim", "qk_dim", "rank"}]),
    frozenset({"layers", "few_layers", "depths", "experts", "active_experts", "expert_groups", "active_groups"}),
    frozenset[str](),
)
