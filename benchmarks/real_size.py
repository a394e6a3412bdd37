"""A real size on this machine: a Qwen3-0.6B config with random bf16 weights, loaded from a folder and served.

    python benchmarks/real_size.py [--folder FOLDER] [--keep]

Prints JSON: peak anonymous memory over that of the imports, against weights + KV pool; CPU seconds of export and passes;
tokens per second of 24 requests of 128 tokens in, 48 out, which fill the pool. Each part runs in a process of its own.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import two_parts
from two_parts import PeakMemory, anonymous_bytes

POOL_BYTES = 500_000_000
NUM_REQUESTS, NUM_IN, NUM_OUT = 24, 128, 48  # fills the pool to 96 %


def write(folder: Path) -> None:
    """The published shape of Qwen3-0.6B with random weights."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=151936,
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=40960,
        tie_word_embeddings=True,
        dtype=torch.bfloat16,
    )
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    Qwen3ForCausalLM(config).save_pretrained(folder)


def measure(folder: Path) -> dict[str, Any]:
    import torch
    from transformers import AutoModelForCausalLM  # noqa: F401, so that its memory counts as that of the imports

    base, memory = anonymous_bytes(), PeakMemory()
    from autodeploy import LLM, SamplingParams  # what this loads is ours and counts

    sizes: dict[str, Any] = {"max_seq_len": 4096, "kv_cache_config": {"max_bytes": POOL_BYTES}}
    with LLM(str(folder), skip_tokenizer_init=True, program_cache=False, **sizes) as llm:
        prompts = torch.randint(0, 151936, (NUM_REQUESTS, NUM_IN), generator=torch.Generator().manual_seed(0)).tolist()
        started = time.perf_counter()
        outputs = llm.generate(prompts, SamplingParams(max_tokens=NUM_OUT, ignore_eos=True))
        seconds = time.perf_counter() - started
        timeline, runner, program = llm.compiled.timeline, llm.compiled.runner, llm.compiled.program
        weight_bytes = program.weight_bytes
        pool_bytes = sum(cache.nbytes for cache in runner.caches)  # pyright: ignore[reportAttributeAccessIssue]
    grown = memory.stop() - base
    return {
        "num_tokens": sum(output.outputs[0].length for output in outputs),
        "tokens_per_second": NUM_REQUESTS * NUM_OUT / seconds,
        "weight_bytes": weight_bytes,
        "pool_bytes": pool_bytes,
        "peak_anonymous_bytes": grown,
        "peak_over_weights_and_pool": grown / (weight_bytes + pool_bytes),
        "export_and_passes_cpu_seconds": timeline.cpu_seconds["export"] + timeline.cpu_seconds["passes"],
        "seconds": timeline.seconds,
    }


if __name__ == "__main__":
    two_parts.run(__doc__, write, measure)
