"""Small stock configs of families, each with the mechanisms of its family switched on. The package knows none of them."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tests.models.mechanisms import LATENT, MIXED
from tests.models.moe_families import MOE_FAMILIES
from tests.models.own_attention_families import OWN_ATTENTION_FAMILIES
from tests.models.recurrent_families import RECURRENT_FAMILIES

COMMON: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT2_NAMES = {
    "vocab_size": 256,
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GEMMA = {**MIXED, "head_dim": 16, "query_pre_attn_scalar": 16}


def rope(kind: str, **parameters: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **parameters}}


LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
YARN = {"factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 32.0, "beta_slow": 1.0}
LONG = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8, "original_max_position_embeddings": 64}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "apertus": ("apertus", {"hidden_act": "xielu"}),
    "arcee": ("arcee", {}),
    "biogpt": ("biogpt", {}),
    "bitnet": ("bitnet", {}),
    "cohere": ("cohere", {"use_qk_norm": True}),
    "cohere2": ("cohere2", MIXED),
    "cwm": ("cwm", {**MIXED, "head_dim": 16}),
    "diffllama": ("diffllama", {}),
    "ernie4_5": ("ernie4_5", {"head_dim": 16}),
    "exaone4": ("exaone4", {**MIXED, "sliding_window_pattern": 2}),
    "gemma2": ("gemma2", {**GEMMA, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 30.0}),
    "gemma3_text": ("gemma3_text", GEMMA),
    "gemma3n_text": (
        "gemma3n_text",
        {
            **MIXED,
            "head_dim": 16,
            "num_kv_shared_layers": 2,
            "vocab_size_per_layer_input": 256,
            "hidden_size_per_layer_input": 16,
            "laurel_rank": 8,
            "activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.0],
            "altup_num_inputs": 4,
            "intermediate_size": [128] * 4,
        },
    ),
    "gemma4_text": (
        "gemma4_text",
        {
            **MIXED,
            "head_dim": 16,
            "global_head_dim": 32,
            "vocab_size_per_layer_input": 256,
            "hidden_size_per_layer_input": 16,
            "num_kv_shared_layers": 2,
            "final_logit_softcapping": 30.0,
        },
    ),
    "glm4": ("glm4", {"head_dim": 16}),
    "gpt2": ("gpt2", GPT2_NAMES),
    "gpt_bigcode": ("gpt_bigcode", GPT2_NAMES),
    "gpt_neox": ("gpt_neox", {}),
    "granite": (
        "granite",
        {"embedding_multiplier": 12.0, "attention_multiplier": 0.1, "residual_multiplier": 0.2, "logits_scaling": 4.0},
    ),
    "granite_swa": ("granite_swa", MIXED),
    "helium": ("helium", {"head_dim": 16}),
    "hunyuan_v1_dense": ("hunyuan_v1_dense", {"head_dim": 16}),
    "llama": ("llama", {}),
    "llama_linear": ("llama", rope("linear", factor=4.0)),
    "llama_llama3": ("llama", rope("llama3", **LLAMA3)),
    "llama_yarn": ("llama", rope("yarn", **YARN)),
    "llama_dynamic": ("llama", {**rope("dynamic", factor=2.0), "max_position_embeddings": 64}),
    "minicpm3": ("minicpm3", LATENT),
    "ministral": ("ministral", {**MIXED, "head_dim": 16}),
    "ministral3": (
        "ministral3",
        {"head_dim": 16, **rope("yarn", **YARN, mscale=1.0, mscale_all_dim=1.0, llama_4_scaling_beta=0.1)},
    ),
    "mistral": ("mistral", {"sliding_window": 8, "head_dim": 16}),
    "nanochat": ("nanochat", {}),
    "nemotron": ("nemotron", {"head_dim": 16}),
    "olmo": ("olmo", {"clip_qkv": 2.0}),
    "olmo2": ("olmo2", {}),
    "olmo3": ("olmo3", MIXED),
    "opt": ("opt", {"ffn_dim": 128, "word_embed_proj_dim": 64}),
    "persimmon": ("persimmon", {}),
    "phi": ("phi", {}),
    "phi3": ("phi3", {"sliding_window": 8, **rope("default", partial_rotary_factor=0.75)}),
    "phi3_longrope": ("phi3", {"original_max_position_embeddings": 64, **rope("longrope", **LONG)}),
    "qwen2": (
        "qwen2",
        {
            "use_sliding_window": True,
            "sliding_window": 8,
            "max_window_layers": 1,
            "layer_types": ["full_attention", "sliding_attention"],
        },
    ),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "seed_oss": ("seed_oss", {"head_dim": 16}),
    "smollm3": ("smollm3", {"num_hidden_layers": 4, "no_rope_layer_interval": 2}),
    "stablelm": ("stablelm", {"qk_layernorm": True}),
    "starcoder2": ("starcoder2", {"sliding_window": 8}),
    "vaultgemma": ("vaultgemma", {**GEMMA, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 30.0}),
    "youtu": ("youtu", LATENT),
    "axk1": ("axk1", {**LATENT, "first_k_dense_replace": 2}),
    "bailing_hybrid_full": ("bailing_hybrid", {**LATENT, "layer_types": ["full_attention"] * 2, "first_k_dense_replace": 2}),
    "deepseek_v3_dense": ("deepseek_v3", {**LATENT, "first_k_dense_replace": 2}),
    "kimi_linear_full": ("kimi_linear", {**LATENT, "layer_types": ["full_attention"] * 2, "first_k_dense_replace": 2}),
    **MOE_FAMILIES,
    **OWN_ATTENTION_FAMILIES,
    **RECURRENT_FAMILIES,
}
"""Test name -> (model_type, overrides of `COMMON`)."""


def make_config(name: str, **overrides: Any) -> Any:
    model_type, changes = FAMILIES[name]
    common = {} if changes is GPT2_NAMES else COMMON
    return CONFIG_MAPPING[model_type](**{**common, **changes, **overrides})


def make_model(name: str, seed: int = 0, **overrides: Any) -> Any:
    """A stock model with every weight moved off its initial value, norms, biases and sinks too, so that a lost one shows."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(make_config(name, **overrides), attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return model if "dtype" in overrides else model.float()
