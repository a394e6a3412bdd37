"""Every dense family equals eager: logits within 1e-5, greedy tokens under chunked prefill and preemption."""

import pytest

from tests.models.families import FAMILIES, make_model
from tests.models.parity import check_parity

LENGTH_DEPENDENT = {"llama_dynamic", "phi3_longrope"}  # eager itself changes with the length of the row: test_rope_by_length.py
QUICK = {
    "mixtral",
    "gpt_oss",  # clamped experts with biases, sinks, windows
    "dbrx",  # experts outside transformers' registry
    "deepseek_v3",  # routing in groups, shared experts
    "cohere",  # interleaved rope, hand-written layer norm, parallel residual
    "diffllama",  # two attention calls per layer
    "falcon_alibi",  # own attention code: alibi, one kv head
    "gemma2",  # softcap, windows, 1 + weight norms
    "gemma3n_text",  # shared KV, per-layer inputs
    "gpt_neo",  # own attention code: windows in a buffer
    "gpt2",  # learned positions, Conv1D
    "granite_swa",  # sinks, windows
    "llama4_text",  # chunks
    "llama_yarn",
    "mamba2",  # no attention at all
    "minicpm3",  # expanded latent attention: V head dim differs from K's
    "olmo_hybrid",  # delta rule and convolutions beside attention
    "qwen3",  # qk-norm, GQA
    "recurrent_gemma",  # RG-LRU beside windowed attention
    "rwkv",  # token shifts; divides its weights in place when eager first runs
    "starcoder2",  # window everywhere, biases
}

NAMES = [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in FAMILIES if name not in LENGTH_DEPENDENT]


@pytest.mark.parametrize("name", NAMES)
def test_family_equals_eager(name: str) -> None:
    verdict = check_parity(make_model(name))
    print(f"{name}: {verdict.judged} of {verdict.total} greedy tokens judged")
