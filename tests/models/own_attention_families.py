"""Families whose attention is not in transformers' registry of attention functions, or whose mask is more than a window."""

from __future__ import annotations

from typing import Any

DECODER: dict[str, Any] = {"is_decoder": True}
SEQ2SEQ: dict[str, Any] = {
    "d_model": 64,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "decoder_attention_heads": 4,
    "decoder_ffn_dim": 128,
}

OWN_ATTENTION_FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("bert", DECODER),
    "big_bird": ("big_bird", {**DECODER, "attention_type": "original_full"}),
    "bloom": ("bloom", {}),
    "codegen": ("codegen", {"rotary_dim": 8}),
    "ctrl": ("ctrl", {"dff": 128}),
    "falcon": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon_alibi": ("falcon", {"multi_query": True, "alibi": True}),
    "falcon_alibi_heads": ("falcon", {"multi_query": False, "alibi": True, "num_attention_heads": 6, "hidden_size": 96}),
    "falcon_multi_query": ("falcon", {"multi_query": True}),
    "gpt_neo": ("gpt_neo", {"attention_types": [[["global", "local"], 1]], "window_size": 8}),
    "gpt_neox_japanese": ("gpt_neox_japanese", {}),
    "gptj": ("gptj", {"rotary_dim": 8}),
    "llama4_text": (
        "llama4_text",
        {
            "num_hidden_layers": 4,
            "head_dim": 16,
            "intermediate_size_mlp": 128,
            "moe_layers": [],
            "no_rope_layer_interval": 4,
            "attention_chunk_size": 8,
            "attn_temperature_tuning": True,
            "floor_scale": 8,
        },
    ),
    "megatron-bert": ("megatron-bert", DECODER),
    "mpt": ("mpt", {"max_seq_len": 256}),
    "mvp": ("mvp", SEQ2SEQ),
    "openai-gpt": ("openai-gpt", {}),
    "rembert": ("rembert", {**DECODER, "input_embedding_size": 32, "output_embedding_size": 32}),
    "roberta": ("roberta", DECODER),
    "roformer": ("roformer", {**DECODER, "embedding_size": 64}),
    "trocr": ("trocr", {**DECODER, **SEQ2SEQ}),
    "xglm": ("xglm", {"ffn_dim": 128}),
}
