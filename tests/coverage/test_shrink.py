"""Small configs from large ones: what they keep, what they shrink, and that they build."""

from typing import Any

import pytest
from transformers import (
    BambaConfig,
    DeepseekV3Config,
    Gemma3nTextConfig,
    Gemma3TextConfig,
    Gemma4TextConfig,
    LlamaConfig,
    Mamba2Config,
    Phi3Config,
    Qwen3NextConfig,
)

from autodeploy.capture.shrink import shrink
from autodeploy.capture.shrink_rules import Sizes


def test_one_layer_of_each_kind_is_kept_in_order() -> None:
    assert shrink(Gemma3TextConfig()).layer_types == ["sliding_attention", "full_attention"]
    assert shrink(Gemma3TextConfig(), Sizes(repeats=2)).layer_types == ["sliding_attention"] * 2 + ["full_attention"] * 2
    assert shrink(Qwen3NextConfig()).layer_types == ["linear_attention", "full_attention"]
    assert shrink(LlamaConfig()).num_hidden_layers == 2
    assert shrink(LlamaConfig(), Sizes(layers=1)).num_hidden_layers == 1


def test_the_dense_layers_before_the_sparse_ones_and_the_shared_ones_at_the_end_stay() -> None:
    dense_first = shrink(DeepseekV3Config())
    assert (dense_first.first_k_dense_replace, dense_first.num_hidden_layers) == (1, 2)
    small = shrink(Gemma3nTextConfig())
    kinds = ["sliding_attention", "full_attention"]
    shared = small.num_kv_shared_layers
    assert small.layer_types[-shared:] == kinds and set(small.layer_types[:-shared]) == set(kinds)
    assert len(small.intermediate_size) == len(small.layer_types) == len(small.activation_sparsity_pattern)


def test_lists_of_layers_are_renumbered() -> None:
    small = shrink(BambaConfig(attn_layer_indices=[9, 18, 27]))
    assert (small.attn_layer_indices, small.num_hidden_layers) == ([1], 2)


def test_what_single_layers_have_of_their_own_stays_larger() -> None:
    small = shrink(Gemma4TextConfig())
    assert [small.per_layer_config[i].head_dim for i in range(2)] == [16, 32]


def test_windows_vocabulary_and_token_ids_fit_short_rows() -> None:
    small = shrink(Gemma3TextConfig(pad_token_id=0, eos_token_id=200_000))
    assert (small.sliding_window, small.vocab_size, small.pad_token_id, small.eos_token_id) == (8, 256, 0, 255)


def test_grouping_of_heads_and_expansion_of_states_stay() -> None:
    heads = [
        (c.num_attention_heads, c.num_key_value_heads)
        for c in (shrink(LlamaConfig()), shrink(LlamaConfig(num_key_value_heads=8)))
    ]
    assert heads == [(4, 4), (4, 2)]
    assert shrink(LlamaConfig(num_key_value_heads=1)).num_key_value_heads == 1
    small = shrink(Mamba2Config())
    assert small.num_heads * small.head_dim == small.expand * small.hidden_size


def test_computed_fields_are_left_to_the_class_and_given_ones_are_kept() -> None:
    assert shrink(LlamaConfig()).head_dim == 16
    assert shrink(LlamaConfig(head_dim=256)).head_dim == 16
    assert (
        shrink(LlamaConfig(rms_norm_eps=0.5, attention_bias=True)).to_dict().items()
        >= {"rms_norm_eps": 0.5, "attention_bias": True}.items()
    )


def test_lists_of_rope_factors_fit_the_small_heads() -> None:
    factors: dict[str, Any] = {"short_factor": [1.0] * 48, "long_factor": [2.0] * 48, "original_max_position_embeddings": 4096}
    config = Phi3Config(rope_parameters={"rope_type": "longrope", "rope_theta": 10000.0, **factors})
    small = shrink(config).rope_parameters
    assert (len(small["short_factor"]), len(small["long_factor"]), small["rope_type"]) == (8, 8, "longrope")


def test_fewer_groups_of_experts_are_chosen_than_there_are() -> None:
    small = shrink(DeepseekV3Config())
    assert (small.n_routed_experts, small.n_group, small.topk_group, small.num_experts_per_tok) == (8, 4, 2, 2)


@pytest.mark.parametrize("kind", [Gemma3TextConfig, DeepseekV3Config, Mamba2Config])
def test_shrinking_again_changes_nothing(kind: type) -> None:
    once = shrink(kind())
    assert shrink(once).to_dict() == once.to_dict()


def test_layers_alone_can_be_cut() -> None:
    small = shrink(LlamaConfig(), Sizes(narrow=False))
    assert (small.num_hidden_layers, small.vocab_size, small.hidden_size) == (2, 256, 4096)
