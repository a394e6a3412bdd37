"""ONNX Runtime GenAI: a batch of `concurrency` prompts of equal length at a time. Converted once, beside the checkpoint."""

import json
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any

PRECISIONS = {16: "fp32", 8: "int8", 4: "int4"}
"""Bits of a weight -> what its builder calls it; for CPUs it has nothing of 16 bits."""
BUILDER = "onnxruntime_genai.models.builder"
model: Any = None


def load(model: str, threads: int, options: dict[str, Any]) -> dict[str, Any]:
    genai, ort = import_module("onnxruntime_genai"), import_module("onnxruntime")
    config: Any = genai.Config(str(folder_of(model, options["bits"])))
    config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}))
    globals()["model"] = genai.Model(config)
    return {"versions": {"onnxruntime": ort.__version__, "onnxruntime_genai": genai.__version__}}


def folder_of(model: str, bits: int) -> Path:
    return Path(model) / f"ort-{PRECISIONS[bits]}"


def prepare(model: str, bits: int) -> dict[str, Any]:
    """Build, unless it was done, by its own settings, but for the head, which is computed for a prompt's last token alone."""
    folder = folder_of(model, bits)
    if not (folder / "genai_config.json").exists():  # written after the weights
        where = ["-i", model, "-o", str(folder), "-c", str(folder)]
        what = ["-p", PRECISIONS[bits], "-e", "cpu", "--extra_options", "prune_lm_head=true"]
        subprocess.run([sys.executable, "-m", BUILDER, *where, *what], check=True, capture_output=True, text=True)
    return {}


def run(prompts: list[list[int]], output_len: int, concurrency: int) -> dict[str, Any]:
    requests = []
    submitted = time.perf_counter()
    for start in range(0, len(prompts), concurrency):
        batch = prompts[start : start + concurrency]
        times = token_times(batch, output_len)
        requests += [{"submitted": submitted, "tokens": times} for _ in batch]
        submitted = time.perf_counter()
    return {"requests": requests}


def token_times(batch: list[list[int]], output_len: int) -> list[float]:
    """When each token of all prompts of a batch was there. The end of sequence cannot be drawn before `min_length`."""
    genai, numpy = import_module("onnxruntime_genai"), import_module("numpy")
    length = len(batch[0]) + output_len
    params: Any = genai.GeneratorParams(model)
    params.set_search_options(batch_size=len(batch), min_length=length, max_length=length, do_sample=False)
    generator: Any = genai.Generator(model, params)
    generator.append_tokens(numpy.array(batch, dtype=numpy.int32))
    times: list[float] = []
    while not generator.is_done():
        generator.generate_next_token()
        times.append(time.perf_counter())
    return times
