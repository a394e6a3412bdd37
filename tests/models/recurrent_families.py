"""Small stock configs of families with recurrent layers: state spaces, linear attention, convolutions, and hybrids of them."""

from __future__ import annotations

from typing import Any

from tests.models.mechanisms import EXPERTS, LATENT

LINEAR = {
    "num_hidden_layers": 4,
    "layer_types": ["linear_attention", "full_attention", "linear_attention", "full_attention"],
}
CONV = {"num_hidden_layers": 4, "layer_types": ["conv", "full_attention", "conv", "full_attention"]}
DELTA = {
    **LINEAR,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
KIMI = {**LINEAR, **LATENT, "linear_head_dim": 16, "linear_num_heads": 4}
MAMBA_2 = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_n_groups": 2, "mamba_chunk_size": 8}

RECURRENT_FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "bailing_hybrid": ("bailing_hybrid", {**KIMI, "num_local_experts": 8, **EXPERTS, "n_group": 2, "topk_group": 1}),
    "bamba": ("bamba", {"attn_layer_indices": [1], **MAMBA_2}),
    "falcon_h1": ("falcon_h1", {**MAMBA_2, "head_dim": 16, "mamba_d_ssm": 64, "mamba_n_heads": 4}),
    "falcon_mamba": ("falcon_mamba", {"state_size": 8}),
    "granitemoehybrid": (
        "granitemoehybrid",
        {
            **MAMBA_2,
            "num_hidden_layers": 4,
            "layer_types": ["mamba", "attention", "mamba", "attention"],
            "shared_intermediate_size": 32,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "position_embedding_type": "rope",
        },
    ),
    "jamba": (
        "jamba",
        {
            "num_hidden_layers": 4,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "mamba_d_state": 8,
        },
    ),
    "kimi_linear": ("kimi_linear", {**KIMI, "num_local_experts": 8, **EXPERTS, "n_group": 2, "topk_group": 1}),
    "lfm2": ("lfm2", CONV),
    "lfm2_moe": ("lfm2_moe", {**CONV, **EXPERTS, "num_dense_layers": 1}),
    "lfm3": ("lfm3", CONV),
    "mamba": ("mamba", {"state_size": 8}),
    "mamba2": (
        "mamba2",
        {"num_heads": 8, "head_dim": 16, "state_size": 16, "n_groups": 2, "chunk_size": 8},
    ),
    "minimax": (
        "minimax",
        {
            "layer_types": ["linear_attention", "full_attention"],
            "head_dim": 16,
            "block_size": 8,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
        },
    ),
    "nemotron_h": (
        "nemotron_h",
        {
            "layers_block_type": ["mamba", "attention", "moe", "mlp"],
            "head_dim": 16,
            "ssm_state_size": 16,
            "mamba_num_heads": 8,
            "mamba_head_dim": 16,
            "n_groups": 2,
            "chunk_size": 8,
            "n_routed_experts": 8,
            **EXPERTS,
            "moe_shared_expert_intermediate_size": 32,
            "n_shared_experts": 1,
        },
    ),
    "olmo_hybrid": ("olmo_hybrid", DELTA),
    "qwen3_5_moe_text": (
        "qwen3_5_moe_text",
        {**DELTA, **EXPERTS, "head_dim": 16, "shared_expert_intermediate_size": 32},
    ),
    "qwen3_5_text": ("qwen3_5_text", {**DELTA, "head_dim": 16}),
    "qwen3_next": ("qwen3_next", {**DELTA, **EXPERTS, "head_dim": 16, "shared_expert_intermediate_size": 32}),
    "recurrent_gemma": (
        "recurrent_gemma",
        {
            "num_hidden_layers": 3,
            "block_types": ["recurrent", "recurrent", "attention"],
            "lru_width": 64,
            "attention_window_size": 8,
            "head_dim": 16,
        },
    ),
    "rwkv": (
        "rwkv",
        {"num_hidden_layers": 4, "rescale_every": 2, "context_length": 256, "attention_hidden_size": 64},
    ),
    "zamba": (
        "zamba",
        {"num_hidden_layers": 6, "attn_layer_period": 3, "attn_layer_offset": 2, "n_mamba_heads": 2, "mamba_d_state": 8},
    ),
    "zamba2": (
        "zamba2",
        {
            "num_hidden_layers": 4,
            "num_key_value_heads": 4,
            "layers_block_type": ["mamba", "mamba", "hybrid", "hybrid"],
            "mamba_d_state": 16,
            "mamba_headdim": 16,
            "n_mamba_heads": 8,
            "mamba_expand": 2,
            "mamba_ngroups": 2,
            "chunk_size": 8,
            "num_mem_blocks": 1,
            "use_shared_attention_adapter": True,
            "adapter_rank": 8,
            "use_mem_rope": True,
        },
    ),
}
"""Test name -> (model_type, overrides of `COMMON`)."""
