"""llama.cpp through its `llama-batched-bench`, which excludes sampling and loads the model in each run.

It prints the time of all prompts and of all further tokens, so the times of single tokens are spread evenly between.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

settings: dict[str, Any] = {}
CONVERT = """
import sys
sys.path.insert(0, {folder!r})
import {module}

def lenient(known):
    def name(self, tokenizer):
        try:
            return known(self, tokenizer)
        except NotImplementedError:
            return "default"
    return name

classes = [value for module in list(sys.modules.values()) for value in vars(module).values() if isinstance(value, type)]
for each in {{each for each in classes if "get_vocab_base_pre" in vars(each)}}:
    each.get_vocab_base_pre = lenient(each.get_vocab_base_pre)
{module}.main()
"""
"""Its converter refuses a tokenizer whose hash it does not know, such as the one written with random weights."""


def binary() -> Path:
    folder = Path(os.environ["AUTODEPLOY_BENCH_LLAMACPP"])
    found = [path for path in (folder / "build" / "bin" / "llama-batched-bench", folder / "llama-batched-bench") if path.exists()]
    return found[0] if found else Path(shutil.which("llama-batched-bench") or "llama-batched-bench")


def prepare(model: str) -> dict[str, Any]:
    """Convert to bf16 GGUF beside the checkpoint, unless a model.gguf is there."""
    file, folder = Path(model) / "model.gguf", os.environ["AUTODEPLOY_BENCH_LLAMACPP"]
    if not file.exists():
        script = Path(folder) / "convert_hf_to_gguf.py"
        code = CONVERT.format(folder=folder, module=script.stem)
        arguments = [model, "--outfile", str(file), "--outtype", "bf16"]
        subprocess.run([sys.executable, "-c", code, *arguments], check=True, cwd=folder)
    return {}


def load(model: str, threads: int, options: dict[str, Any]) -> dict[str, Any]:
    settings.update(file=str(Path(model) / "model.gguf"), threads=threads)
    text = subprocess.run([str(binary()), "--version"], capture_output=True, text=True, check=True)
    lines = (text.stdout + text.stderr).splitlines()
    return {"versions": {"llama.cpp": next((line for line in lines if "version" in line), "unknown")}}


def run(prompts: list[list[int]], output_len: int, concurrency: int) -> dict[str, Any]:
    """Waves of `concurrency` prompts; the first token counts as there when the prompts are computed."""
    length, further = len(prompts[0]), max(output_len - 1, 1)
    context = concurrency * (length + further) + 64
    sizes = ["-npp", length, "-ntg", further, "-npl", concurrency, "-c", context, "-b", 2048, "-ub", 512]
    flags = ["-t", settings["threads"], "-tb", settings["threads"], "--output-format", "jsonl"]
    requests: list[dict[str, Any]] = []
    for _ in range(0, len(prompts), concurrency):
        command = [str(binary()), "-m", settings["file"], *map(str, sizes + flags)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        row = next(json.loads(line) for line in (done.stdout + done.stderr).splitlines() if line.startswith("{"))
        requests += [spread(row["t_pp"], row["t_tg"], output_len) for _ in range(concurrency)]
    return {"requests": requests, "spread_evenly": True}


def spread(prefill: float, decode: float, output_len: int) -> dict[str, Any]:
    """Times of one request that ends now; seconds."""
    first = time.perf_counter() - decode
    step = decode / max(output_len - 1, 1)
    return {"submitted": first - prefill, "tokens": [first + step * i for i in range(output_len)]}
