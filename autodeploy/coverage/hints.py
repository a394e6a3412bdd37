"""Fields that no shrinking rule finds, by model type. A test proves each of them needed."""

from typing import Any

HINTS: dict[str, dict[str, Any]] = {
    # its rope wants parameters per kind of layer, and its own default has none
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}},
    # its attention reads two values that its default config lacks
    "dbrx": {"attn_config": {"clip_qkv": 8.0, "rope_theta": 10000.0}},
    # one head size is the sum of two others in some layers only
    "dots3_note": {"text_config": {"head_dim": 24}},
    # as dots3_note
    "dots3_note_text": {"head_dim": 24},
    # the kinds of its layers are written as a nested list with counts
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    # its default has no kinds of layers
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv", "full_attention"], "num_hidden_layers": 4},
    # its default leaves its indexer unset, and every attention layer needs it
    "qwen4_exp": {
        "text_config": {
            "indexer_n_heads": 2,
            "indexer_kv_heads": 1,
            "indexer_head_dim": 16,
            "indexer_budget": 8,
            "indexer_compress_ratio": 2,
        }
    },
    # as qwen4_exp
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
    },
    # its causal language model refuses the default, which is no decoder
    "reformer": {"is_decoder": True},
    # it wants a language before a forward
    "xmod": {"default_language": "en_XX"},
}
