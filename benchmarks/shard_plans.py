"""Large models shared among many ranks, from their configs alone: CPU seconds of the plan, the pass and its derivation.

    python benchmarks/shard_plans.py [--ranks 8 64] [NAME ...]

Each model runs in a process of its own. "shared" is the part of all bytes that a rank does not have, "linears" counts them by how
ranks share them, and "differs" are the modules for which transformers' own plan says something else.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections import Counter
from typing import Any

LIMIT = 60.0
"""CPU seconds of planning, sharding and derivation, on top of the compilation without ranks."""
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-3.1-70b": (
        "llama",
        {
            "vocab_size": 128256,
            "hidden_size": 8192,
            "intermediate_size": 28672,
            "num_hidden_layers": 80,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
            "max_position_embeddings": 131072,
        },
    ),
    "qwen3-235b-a22b": (
        "qwen3_moe",
        {
            "vocab_size": 151936,
            "hidden_size": 4096,
            "intermediate_size": 12288,
            "num_hidden_layers": 94,
            "num_attention_heads": 64,
            "num_key_value_heads": 4,
            "head_dim": 128,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 1536,
            "norm_topk_prob": True,
            "max_position_embeddings": 40960,
        },
    ),
    "deepseek-v3": ("deepseek_v3", {}),
    "gpt-oss-120b": ("gpt_oss", {"num_hidden_layers": 36, "num_local_experts": 128}),
}
"""Name -> (model type, values other than the config class's own defaults, which are the published ones)."""


def measure(name: str, num_ranks: int) -> dict[str, Any]:
    """Share one model in this process; experts are dealt out to as many groups as divide them."""
    import torch
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    from autodeploy.capture.export import capture
    from autodeploy.capture.skeleton import build_skeleton
    from autodeploy.specs import Mesh, Target
    from autodeploy.transforms.check_shares import check_shares
    from autodeploy.transforms.default import default_pipeline
    from autodeploy.transforms.pipeline import Pipeline
    from autodeploy.transforms.plan_sharding import plan_sharding
    from autodeploy.transforms.rewrite import erase_dead
    from autodeploy.transforms.shard import ShardModel
    from autodeploy.transforms.shard_plan import disagreements

    model_type, values = CONFIGS[name]
    config = CONFIG_MAPPING[model_type](**values)
    skeleton: Any = build_skeleton(config, torch.bfloat16)
    program = capture(skeleton, dict(skeleton.named_buffers())).program
    default = default_pipeline()
    Pipeline(default.passes[: default.index("match_mlp") + 1]).run(program, Target(), verify="off")
    whole, before = program.weight_bytes, program.snapshot()
    mesh = Mesh(num_ranks, num_ranks if "moe" in model_type or model_type in ("deepseek_v3", "gpt_oss") else 1)
    times = [time.process_time()]
    plan = plan_sharding(program, mesh)
    times.append(time.process_time())
    ShardModel().apply(program, Target(mesh=mesh))
    erase_dead(program)
    times.append(time.process_time())
    check_shares(before, program)
    times.append(time.process_time())
    return {
        "name": name,
        "ranks": num_ranks,
        "plan": round(times[1] - times[0], 1),
        "pass": round(times[2] - times[1], 1),
        "derivation": round(times[3] - times[2], 1),
        "total": round(times[3] - times[0], 1),
        "shared": round(1 - program.weight_bytes / whole, 4),
        "bytes": program.weight_bytes,
        "sums": len(plan.reduced),
        "linears": dict(Counter(plan.linears().values())),
        "refused": dict(plan.refused),
        "differs": disagreements(plan, skeleton.tp_plan),
    }


def in_own_process(name: str, num_ranks: int) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, __file__, "--measure", name, str(num_ranks)], capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    if sys.argv[1:2] == ["--measure"]:
        print(json.dumps(measure(sys.argv[2], int(sys.argv[3]))))
        return
    given = sys.argv[1:]
    ranks = [int(word) for word in given if word.isdigit()] or [8, 64]
    names = [word for word in given if word in CONFIGS] or list(CONFIGS)
    for name in names:
        for num_ranks in ranks:
            print(json.dumps(in_own_process(name, num_ranks)), flush=True)


if __name__ == "__main__":
    main()
