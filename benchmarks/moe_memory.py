"""Memory while a checkpoint of single experts becomes stacked parameters: 2 GB of random bf16 experts, loaded from a folder.

    python benchmarks/moe_memory.py [--folder FOLDER] [--keep]

Prints JSON: peak anonymous memory over that of the imports, against the weights. Writing and measuring run in processes of
their own.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import two_parts
from two_parts import PeakMemory, anonymous_bytes


def config() -> Any:
    """1.0 B parameters, 98 % of them in 16 layers of 64 experts."""
    from transformers import Qwen3MoeConfig

    return Qwen3MoeConfig(
        vocab_size=8192,
        hidden_size=512,
        num_hidden_layers=16,
        num_attention_heads=8,
        num_key_value_heads=2,
        num_experts=64,
        num_experts_per_tok=4,
        moe_intermediate_size=640,
        max_position_embeddings=4096,
        dtype="bfloat16",
    )


def write(folder: Path) -> None:
    """As it would come from elsewhere: one tensor per expert and matrix, in shards."""
    import torch
    from transformers import Qwen3MoeForCausalLM

    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    Qwen3MoeForCausalLM(config()).save_pretrained(folder, max_shard_size="500MB")


def measure(folder: Path) -> dict[str, Any]:
    from autodeploy.capture.origin import origin_of
    from autodeploy.checkpoint import CheckpointSource
    from autodeploy.weights import WeightPlan, materialize

    base, memory, started = anonymous_bytes(), PeakMemory(), time.perf_counter()
    origin = origin_of(folder, "auto", False)
    assert isinstance(origin.source, CheckpointSource)
    weights = dict(materialize(WeightPlan(origin.recipes), origin.source))
    seconds, grown = time.perf_counter() - started, memory.stop() - base
    weight_bytes = sum(tensor.nbytes for tensor in weights.values())
    return {
        "stored_tensors": len(origin.source.names()),
        "parameters": len(weights),
        "weight_bytes": weight_bytes,
        "peak_anonymous_bytes": grown,
        "peak_over_weights": grown / weight_bytes,
        "seconds": seconds,
    }


if __name__ == "__main__":
    two_parts.run(__doc__, write, measure)
