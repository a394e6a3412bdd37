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

TRIES = 10
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

def looked_for(known):
    def vocabulary(self):
        if not (self.dir_model / "tokenizer.model").exists():
            raise FileNotFoundError("tokenizer.model")
        return known(self)
    return vocabulary

classes = [value for module in list(sys.modules.values()) for value in vars(module).values() if isinstance(value, type)]
for each in {{each for each in classes if "get_vocab_base_pre" in vars(each)}}:
    each.get_vocab_base_pre = lenient(each.get_vocab_base_pre)
    each._create_vocab_sentencepiece = looked_for(each._create_vocab_sentencepiece)
{module}.main()
"""
"""Its converter refuses a tokenizer whose hash it does not know, such as the one written with random weights, and imports
sentencepiece before it finds that there is no such model."""


KINDS = {8: "Q8_0", 4: "Q4_0"}
"""Bits of a weight -> what llama.cpp calls it."""


def binary(name: str = "llama-batched-bench") -> Path:
    folder = Path(os.environ["AUTODEPLOY_BENCH_LLAMACPP"])
    found = [path for path in (folder / "build" / "bin" / name, folder / name) if path.exists()]
    return found[0] if found else Path(shutil.which(name) or name)


def file_of(model: str, bits: int) -> Path:
    return Path(model) / ("model.gguf" if bits == 16 else f"model-{KINDS[bits]}.gguf")


def prepare(model: str, bits: int) -> dict[str, Any]:
    """Convert to GGUF beside the checkpoint, unless that is there: bf16, and from that what has fewer bits."""
    file, folder = Path(model) / "model.gguf", os.environ["AUTODEPLOY_BENCH_LLAMACPP"]
    if not file.exists():
        script = Path(folder) / "convert_hf_to_gguf.py"
        code = CONVERT.format(folder=folder, module=script.stem)
        arguments = [model, "--outfile", str(file), "--outtype", "bf16"]
        subprocess.run([sys.executable, "-c", code, *arguments], check=True, cwd=folder, capture_output=True, text=True)
    if bits != 16 and not file_of(model, bits).exists():
        command = [str(binary("llama-quantize")), str(file), str(file_of(model, bits)), KINDS[bits]]
        subprocess.run(command, check=True, capture_output=True, text=True)
    return {}


def load(model: str, threads: int, options: dict[str, Any]) -> dict[str, Any]:
    settings.update(file=str(file_of(model, options["bits"])), threads=threads)
    text = subprocess.run([str(binary()), "--version"], capture_output=True, text=True, check=True)
    lines = (text.stdout + text.stderr).splitlines()
    return {"versions": {"llama.cpp": next((line for line in lines if "version" in line), "unknown")}}


def run(prompts: list[list[int]], output_len: int, concurrency: int) -> dict[str, Any]:
    """Waves of `concurrency` prompts, each counted from the end of the one before: the model is loaded anew in between.

    The first token counts as there when the prompts are computed.
    """
    requests: list[dict[str, Any]] = []
    started = None
    for done in range(0, len(prompts), concurrency):
        many = min(concurrency, len(prompts) - done)
        row = row_of(len(prompts[0]), output_len, many)
        prefill, decode = row["t_pp"], row["t_tg"]
        started = time.perf_counter() - prefill - decode if started is None else started
        requests += [spread(started, prefill, decode, output_len)] * many
        started += prefill + decode
    return {"requests": requests, "spread_evenly": True}


def row_of(input_len: int, output_len: int, many: int) -> dict[str, Any]:
    """What it prints of so many prompts. It ends without waiting for the thread that prints, so that sometimes nothing comes."""
    further = max(output_len - 1, 1)
    sizes = ["-npp", input_len, "-ntg", further, "-npl", many, "-c", many * (input_len + further) + 64, "-b", 2048, "-ub", 512]
    flags = ["-t", settings["threads"], "-tb", settings["threads"], "--output-format", "jsonl"]
    command = [str(binary()), "-m", settings["file"], *map(str, sizes + flags)]
    for _ in range(TRIES):
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        if rows := [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]:
            return rows[0]
    raise RuntimeError(f"llama-batched-bench printed nothing {TRIES} times")


def spread(submitted: float, prefill: float, decode: float, output_len: int) -> dict[str, Any]:
    """Times of one request; seconds."""
    step = decode / max(output_len - 1, 1)
    return {"submitted": submitted, "tokens": [submitted + prefill + step * i for i in range(output_len)]}
