"""What only a GPU can tell: kernels against float64, models against Hugging Face, speed against what the card can do.

    python tools/gpu_check.py numerics|e2e|speed [--dry-run] [--budget SECONDS]

Each part writes gpu_check_<part>.json to $OUT (else here) after every row, prints each row as it comes, and ends with a table.
Without a GPU, or with --dry-run, what needs one is skipped with a line, and the rest runs on tiny numbers on the CPU. The exit
code is 1 if a row failed. After an error that leaves the GPU unusable a new process goes on with the next row.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT)]
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from torch import Tensor

import autodeploy
from autodeploy import CompiledModel, SamplingParams
from autodeploy.coverage.judge import random_prompts
from tools import gpu_sampling
from tools.gpu_cases import TINY, Draw, Sizes, cases, examine
from tools.gpu_rows import Check, free, measure_limits, providers, seconds_of, short, switch_graphs
from tools.gpu_speed import speed

BUDGET = 450.0
"""Seconds of a part, so that it ends well within a call of 8 minutes."""
FAMILIES = (
    *("llama", "qwen3", "gemma2", "gpt2", "bloom", "phi3_longrope", "mixtral", "deepseek_v3"),
    *("gpt_oss", "qwen3_next", "mamba2", "falcon_mamba"),
)


LENGTHS, NUM_NEW = (1, 5, 13, 22, 34), 24
NUM_JUDGED = len(LENGTHS) * NUM_NEW


def environment(check: Check) -> dict[str, Any]:
    def said_by(*command: str) -> str:
        if shutil.which(command[0]) is None:
            return ""
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False).stdout.strip()

    query = "name,driver_version,memory.total,clocks.sm,clocks.max.sm,power.limit"
    return {
        "gpu": said_by("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader") if check.is_gpu else "",
        "capability": torch.cuda.get_device_capability() if check.is_gpu else None,
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
        "commit": said_by("git", "rev-parse", "HEAD") or os.environ.get("COMMIT", ""),
        "sources": _hash_of_sources(),
        **{name: _version(name) for name in ("torch", "triton", "transformers", "numpy")},
    }


def _hash_of_sources() -> str:
    """Tells which code ran where there is no git."""
    files = sorted((ROOT / "autodeploy").rglob("*.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:16]


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


# Part 1: kernels against float64


def numerics(check: Check) -> None:
    measure_limits(check)
    sizes = Sizes() if check.is_gpu else TINY
    if not check.is_gpu:
        check.skip("Triton providers", "no GPU; the same calls run on the CPU, on small numbers")
    for case in (*cases(), *gpu_sampling.cases()):
        for dtype in case.dtypes:
            name = f"{case.name} {str(dtype).removeprefix('torch.')}"
            if check.wants(name, least=5):
                torch.manual_seed(0)
                with check.row(name) as facts, torch.inference_mode():
                    _fill(facts, check, case, Draw(check.device, dtype, sizes))
                free(check)


def _fill(facts: dict[str, Any], check: Check, case: Any, draw: Draw) -> None:
    found = examine(case, draw)
    facts |= {"provider": found.provider, "error": found.error, "allowed": found.allowed}
    if check.is_gpu and found.provider == "reference":
        against = {name: why for name, why in found.against.items() if name.startswith("triton")}
        facts |= {"status": "skipped", "reason": f"only the reference: {against or 'no Triton provider'}"}
    elif not found.is_near:
        facts["status"] = "failed"
    seconds = seconds_of(found.run, check.device)
    facts |= {"microseconds": seconds * 1e6, "GB_per_s": found.num_bytes / seconds / 1e9}


# Part 2: small models against Hugging Face


def e2e(check: Check) -> None:
    if not check.is_gpu:
        check.skip("CUDA graphs", "no GPU; one family runs on the CPU")
    for family in FAMILIES if check.is_gpu else FAMILIES[:1]:
        for dtype in (torch.float32, torch.bfloat16):
            name = f"{family} {str(dtype).removeprefix('torch.')}"
            if check.wants(name, least=15):
                with check.row(name) as facts:
                    _compare_family(facts, check, family, dtype)
                free(check)


def _compare_family(facts: dict[str, Any], check: Check, family: str, dtype: torch.dtype) -> None:
    """Tokens of the compiled model, without and with graphs, judged by eager's logits of the same tokens."""
    from tests.models.families import make_model

    model = make_model(family).to(check.device, dtype)
    compiled = autodeploy.compile(model, device=check.device, kv_cache_config={"max_tokens": 4096})
    try:
        graphs: Any = compiled.runner.graphs  # pyright: ignore[reportAttributeAccessIssue]
        facts["providers"] = providers(compiled)
        facts |= {f"plain {key}": value for key, value in _judge(model, _tokens(compiled, False)).items()}
        if graphs is not None:
            for _ in range(2):  # the second time, all shapes are known
                tokens = _tokens(compiled, True)
            facts |= {f"graphs {key}": value for key, value in _judge(model, tokens).items()}
            facts |= {"replayed": graphs.num_replays, "captured": len(graphs.captured), "not captured": graphs.failure}
        wrong = max(facts["plain wrong"], facts.get("graphs wrong", 0))
        facts["status"] = "failed" if wrong > _allowed_wrong(dtype) or facts.get("not captured") else "ok"
    finally:
        compiled.shutdown()


def _allowed_wrong(dtype: torch.dtype) -> int:
    """In bfloat16 rounding now and then sends a token to another expert."""
    return NUM_JUDGED // 10 if dtype == torch.bfloat16 else 0


def _tokens(compiled: CompiledModel, use_graphs: bool) -> list[tuple[list[int], list[int]]]:
    """(prompt, greedy tokens) of several requests served at once."""
    switch_graphs(compiled, use_graphs)
    prompts, params = random_prompts(LENGTHS), SamplingParams(max_tokens=NUM_NEW, ignore_eos=True)
    handles = [compiled.submit(ids, params) for ids in prompts]
    return [(ids, list(handle.result(60).outputs[0].token_ids)) for ids, handle in zip(prompts, handles, strict=True)]


def _judge(model: Any, served: list[tuple[list[int], list[int]]]) -> dict[str, Any]:
    """Tokens that are eager's own choice, and wrong ones: eager prefers another by more than what rounding explains.

    behind: how far the chosen logit lies below eager's largest, at most, relative to the largest magnitude.
    """
    behind: list[float] = []
    for ids, tokens in served:
        with torch.inference_mode():
            logits: Tensor = model(torch.tensor([ids + tokens], device=model.device), use_cache=False).logits[0].float()
        rows = logits[len(ids) - 1 : len(ids) + len(tokens) - 1]
        chosen = rows.gather(1, torch.tensor(tokens, device=rows.device)[:, None])[:, 0]
        behind += ((rows.amax(-1) - chosen) / rows.abs().amax()).tolist()
    allowed = 5e-2 if model.dtype == torch.bfloat16 else 1e-4
    same, wrong = sum(x == 0 for x in behind), sum(x > allowed for x in behind)
    return {"same": f"{same}/{len(behind)}", "wrong": wrong, "behind": max(behind)}


# Command line


def table(rows: list[dict[str, Any]]) -> str:
    """The numbers of all rows, as text."""
    lines = [f"{'status':<8} {'name':<52} what"]
    for row in rows:
        facts = {key: value for key, value in list(row.items())[2:] if isinstance(value, int | float | str)}
        lines.append(f"{row['status']:<8} {row['name']:<52} " + ", ".join(f"{k}={short(v)[:60]}" for k, v in facts.items()))
    return "\n".join(lines)


PARTS: dict[str, Callable[[Check], None]] = {"numerics": numerics, "e2e": e2e, "speed": speed}


def main() -> int:
    parser = argparse.ArgumentParser(description="Checks that need a GPU.")
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--dry-run", action="store_true", help="as on a machine without a GPU")
    parser.add_argument("--budget", type=float, default=BUDGET, help="seconds; what does not fit is skipped")
    parser.add_argument("--resume", action="store_true", help="go on with the rows that the file does not have")
    parser.add_argument("--deadline", type=float, help="seconds since 1970, in place of a budget")
    given = parser.parse_args()
    has_gpu = not given.dry_run and torch.cuda.is_available()
    file = Path(os.environ.get("OUT") or ".") / f"gpu_check_{given.part}.json"
    deadline = given.deadline or time.time() + given.budget
    check = Check(given.part, "cuda:0" if has_gpu else "cpu", deadline, file, given.resume)
    check.found["environment"] = environment(check)
    check.write()
    print(json.dumps(check.found["environment"]), flush=True)
    PARTS[given.part](check)
    rows = check.found["rows"]
    check.found["counts"] = {status: sum(row["status"] == status for row in rows) for status in ("ok", "failed", "skipped")}
    check.write()
    print(f"\n{table(rows)}\n\n{given.part}: {check.found['counts']}, {check.file}", flush=True)
    return int(check.found["counts"]["failed"] > 0)


if __name__ == "__main__":
    sys.exit(main())
