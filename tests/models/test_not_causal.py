"""Models that are not causal, or whose masks depend on more than positions, are refused with module, line and reason."""

from __future__ import annotations

from typing import Any

import pytest

import autodeploy
from autodeploy import UnsupportedModelError
from tests.models.families import FAMILIES, make_model

ALL = "bidirectional: every token sees all others"
NOT_CAUSAL: dict[str, tuple[str, dict[str, Any], str, str]] = {
    "encoder with registered attention": ("bert", {"is_decoder": False}, "BertSelfAttention, line", "not causal"),
    "encoder with own attention": ("rembert", {"is_decoder": False}, r"encoder\.layer\.0.* at .*modeling_rembert\.py:", ALL),
    "relative positions, encoder": ("roformer", {"is_decoder": False}, r"encoder\.layer\.0.* at .*modeling_roformer\.py:", ALL),
    "decoder made an encoder by its config": (
        "gemma3_text",
        {"use_bidirectional_attention": True},
        "Gemma3Attention",
        "not causal",
    ),
    "decoder with is_causal off": ("llama", {"is_causal": False}, "LlamaAttention, line", "not causal"),
    "lengths read from tokens": ("xlm", {"causal": True}, r"at .*modeling_xlm\.py:", "read from the values of a tensor"),
    "blocks once a row is long": (
        "big_bird",
        {"attention_type": "block_sparse", "block_size": 4, "num_random_blocks": 1},
        "BigBirdForCausalLM, line",
        "at most 28 tokens",
    ),
    "masks made of values": ("doge", {}, "DogeAttention, line", "an attention mask of its own"),
}


@pytest.mark.parametrize("name", NOT_CAUSAL)
def test_it_is_refused_by_module_line_and_reason(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    family, changes, where, reason = NOT_CAUSAL[name]
    monkeypatch.setitem(FAMILIES, family, (family, {**FAMILIES.get(family, (family, {}))[1], **changes}))
    with pytest.raises(UnsupportedModelError, match=f"{where}.*{reason}"):
        autodeploy.compile(make_model(family))
