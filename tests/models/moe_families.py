"""Small stock configs of families with mixtures of experts."""

from __future__ import annotations

from typing import Any

from tests.models.mechanisms import EXPERTS, LATENT, MIXED

LOCAL = {"num_local_experts": 8, "num_experts_per_tok": 2}
ROUTED = {"n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_shared_experts": 1}
ONE_DENSE = {"first_k_dense_replace": 1, "num_hidden_layers": 3}
GROUPS = {"n_group": 4, "topk_group": 2}
NO_GROUPS = {"n_group": 1, "topk_group": 1}

MOE_FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "afmoe": ("afmoe", {**MIXED, **EXPERTS, "num_dense_layers": 1, "head_dim": 16, "num_shared_experts": 1}),
    "aria_text": ("aria_text", {"moe_num_experts": 8, "moe_topk": 2, "intermediate_size": 32}),
    "axk1": ("axk1", {**ROUTED, **LATENT, **GROUPS, "mlp_layer_types": ["dense", "sparse"]}),
    "beam": ("beam", {**MIXED, **EXPERTS, **GROUPS, "head_dim": 16, "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"]}),
    "cohere2_moe": ("cohere2_moe", {**MIXED, **EXPERTS, "head_dim": 16, "num_shared_experts": 1, "intermediate_size": 32}),
    "flint": ("flint", {**MIXED, **EXPERTS, "head_dim": 16, "shared_expert_intermediate_size": 32}),
    "granitemoe_swa": ("granitemoe_swa", {**MIXED, **LOCAL, "shared_intermediate_size": 32}),
    "hy_v3": ("hy_v3", {**EXPERTS, "head_dim": 16, "num_shared_experts": 1, "mlp_layer_types": ["dense", "sparse"]}),
    "kolibri1": ("kolibri1", {**MIXED, **EXPERTS, "head_dim": 16, "shared_expert_intermediate_size": 32}),
    "mellum": ("mellum", {**MIXED, **EXPERTS, "head_dim": 16}),
    "dbrx": (
        "dbrx",
        {
            "d_model": 64,
            "n_heads": 4,
            "n_layers": 2,
            "max_seq_len": 256,
            "vocab_size": 256,
            "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
            "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 64},
        },
    ),
    "deepseek_v2": ("deepseek_v2", {**ROUTED, **LATENT, **GROUPS, **ONE_DENSE, "topk_method": "group_limited_greedy"}),
    "deepseek_v3": ("deepseek_v3", {**ROUTED, **LATENT, **GROUPS, **ONE_DENSE}),
    "dots1": ("dots1", {**ROUTED, **NO_GROUPS, "first_k_dense_replace": 1}),
    "ernie4_5_moe": (
        "ernie4_5_moe",
        {
            "moe_num_experts": 8,
            "moe_k": 2,
            "moe_intermediate_size": 32,
            "moe_layer_start_index": 1,
            "moe_num_shared_experts": 1,
        },
    ),
    "exaone_moe": ("exaone_moe", {**MIXED, **EXPERTS}),
    "flex_olmo": ("flex_olmo", {"num_experts": 8, "num_experts_per_tok": 2}),
    "gemma4_text_moe": (
        "gemma4_text",
        {
            **MIXED,
            "head_dim": 16,
            "global_head_dim": 32,
            "vocab_size_per_layer_input": 256,
            "hidden_size_per_layer_input": 0,
            "enable_moe_block": True,
            "num_experts": 8,
            "top_k_experts": 2,
            "moe_intermediate_size": 32,
            "attention_k_eq_v": True,
            "num_global_key_value_heads": 1,
        },
    ),
    "glm4_moe": ("glm4_moe", {**ROUTED, **NO_GROUPS, "first_k_dense_replace": 1, "head_dim": 16, "use_qk_norm": True}),
    "glm4_moe_lite": ("glm4_moe_lite", {**ROUTED, **LATENT, **NO_GROUPS}),
    "gpt_oss": ("gpt_oss", {**MIXED, **LOCAL, "head_dim": 16, "intermediate_size": 32, "swiglu_limit": 0.25}),
    "granitemoe": ("granitemoe", LOCAL),
    "granitemoeshared": ("granitemoeshared", {**LOCAL, "shared_intermediate_size": 32}),
    "hunyuan_v1_moe": ("hunyuan_v1_moe", {"head_dim": 16, "num_experts": 8, "moe_topk": 2}),
    "jetmoe": ("jetmoe", {"kv_channels": 16, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "laguna": ("laguna", EXPERTS),
    "llama4_text_moe": (
        "llama4_text",
        {
            "num_hidden_layers": 4,
            "head_dim": 16,
            "intermediate_size": 32,
            "intermediate_size_mlp": 128,
            "num_local_experts": 4,
            "num_experts_per_tok": 1,
            "interleave_moe_layer_step": 2,
            "no_rope_layer_interval": 4,
            "attention_chunk_size": 8,
            "use_qk_norm": True,
            "attn_temperature_tuning": True,
            "floor_scale": 8,
        },
    ),
    "longcat_flash": (
        "longcat_flash",
        {
            **LATENT,
            "head_dim": 8,
            "ffn_hidden_size": 128,
            "expert_ffn_hidden_size": 32,
            "n_routed_experts": 8,
            "zero_expert_num": 4,
            "moe_topk": 2,
            "num_hidden_layers": 4,
        },
    ),
    "mimo_v2_flash": ("mimo_v2_flash", ROUTED),
    "minimax_m2": ("minimax_m2", {**LOCAL, "head_dim": 16, "rotary_dim": 8}),
    "mixtral": ("mixtral", LOCAL),
    "olmoe": ("olmoe", {"num_experts": 8, "num_experts_per_tok": 2}),
    "phimoe": ("phimoe", {**LOCAL, "sliding_window": 8}),
    "qwen2_moe": ("qwen2_moe", {**EXPERTS, "shared_expert_intermediate_size": 64}),
    "qwen3_moe": ("qwen3_moe", {**EXPERTS, "head_dim": 16, "norm_topk_prob": True}),
    "solar_open": ("solar_open", {**ROUTED, "head_dim": 16}),
}
"""Test name -> (model_type, overrides of `families.COMMON`)."""
