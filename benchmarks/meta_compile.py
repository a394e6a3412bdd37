"""Full-size models compiled from their configs alone: CPU seconds, memory, and whether every layer became its semantic op.

    python benchmarks/meta_compile.py [NAME ...]

Each model runs in a process of its own; the figures are CPU seconds, imports not counted, and the peak resident memory.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from collections import Counter
from typing import Any

LIMITS = {"llama-3.1-8b": 20.0, "gpt-oss-20b": 20.0, "qwen3-30b-a3b": 30.0, "qwen3-next-80b": 45.0, "deepseek-v3": 60.0}
"""CPU seconds."""
MAX_BYTES = int(1.5e9)
"""Resident memory."""

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-3.1-8b": (
        "llama",
        {
            "vocab_size": 128256,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "max_position_embeddings": 131072,
            "rope_parameters": LLAMA3,
        },
    ),
    "gpt-oss-20b": ("gpt_oss", {"num_hidden_layers": 24, "num_local_experts": 32}),
    "qwen3-30b-a3b": (
        "qwen3_moe",
        {
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "num_hidden_layers": 48,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "head_dim": 128,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 768,
            "norm_topk_prob": True,
            "max_position_embeddings": 40960,
        },
    ),
    "qwen3-next-80b": ("qwen3_next", {}),
    "deepseek-v3": ("deepseek_v3", {}),
}
"""Name -> (model type, values other than the config class's own defaults, which are the published ones)."""
COUNTS: dict[str, dict[str, int]] = {
    "llama-3.1-8b": {"attention": 32},
    "gpt-oss-20b": {"attention": 24, "moe": 24},
    "qwen3-30b-a3b": {"attention": 48, "moe": 48},
    "qwen3-next-80b": {"attention": 12, "moe": 48, "causal_conv1d": 36, "gated_delta_rule": 36},
    "deepseek-v3": {"attention": 61, "moe": 58},
}
"""Calls that each program must have: one per layer of that kind."""


def make_config(name: str) -> Any:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    model_type, values = CONFIGS[name]
    return CONFIG_MAPPING[model_type](**values)


def measure(name: str) -> dict[str, Any]:
    """Compile one model in this process."""
    import torch

    from autodeploy.capture.export import capture
    from autodeploy.capture.skeleton import build_skeleton
    from autodeploy.specs import Target
    from autodeploy.transforms.default import default_pipeline

    config, start = make_config(name), time.process_time()
    skeleton: Any = build_skeleton(config, torch.bfloat16)
    built = time.process_time()
    program = capture(skeleton, dict(skeleton.named_buffers())).program
    captured = time.process_time()
    default_pipeline().run(program, Target())
    done = time.process_time()
    return {
        "name": name,
        "parameters": sum(p.numel() for p in skeleton.parameters()),
        "build": round(built - start, 1),
        "export": round(captured - built, 1),
        "passes": round(done - captured, 1),
        "total": round(done - start, 1),
        "nodes": program.op_counts().total(),
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "ops": count_ops(program),
        "pass_seconds": {record.name: round(record.seconds, 2) for record in program.history},
    }


def count_ops(program: Any) -> dict[str, int]:
    """Calls of attention, expert and recurrent ops, whichever provider was chosen, by the names of `COUNTS`."""
    from autodeploy.custom_ops import PROVIDED

    names = [PROVIDED[node.target][0].name for node in program.graph.graph.nodes if node.target in PROVIDED]
    found = Counter(name.removeprefix("paged_").removesuffix("_cached") for name in names)
    return {op: found[op] for op in sorted({op for ops in COUNTS.values() for op in ops}) if found[op]}


def in_own_process(name: str) -> dict[str, Any]:
    done = subprocess.run([sys.executable, __file__, "--one", name], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{name}: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def main(names: list[str]) -> None:
    for name in names or CONFIGS:
        print(json.dumps(in_own_process(name)), flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        print(json.dumps(measure(sys.argv[2])))
    else:
        main(sys.argv[1:])
