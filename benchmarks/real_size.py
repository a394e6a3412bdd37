"""A real size on this machine: a Qwen3-0.6B config with random bf16 weights, loaded from a folder and served.

    python benchmarks/real_size.py [--folder FOLDER] [--keep]

Prints JSON: peak anonymous memory over that of the imports, against weights + KV pool; CPU seconds of export and passes;
tokens per second of 24 requests of 128 tokens in, 48 out, which fill the pool. Each part runs in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

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


def anonymous_bytes() -> int:
    """RssAnon of this process."""
    match = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert match is not None
    return int(match[1]) * 1024


class PeakMemory:
    """Samples RssAnon every 10 ms until stopped."""

    def __init__(self) -> None:
        self.peak, self._stop = anonymous_bytes(), threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()

    def _sample(self) -> None:
        while not self._stop.wait(0.01):
            self.peak = max(self.peak, anonymous_bytes())

    def stop(self) -> int:
        self._stop.set()
        self._thread.join()
        return self.peak


def measure(folder: Path) -> dict[str, Any]:
    import torch
    import transformers  # noqa: F401
    from transformers import AutoModelForCausalLM  # noqa: F401

    base, memory = anonymous_bytes(), PeakMemory()
    from autodeploy import LLM, SamplingParams

    sizes: dict[str, Any] = {"max_seq_len": 4096, "kv_cache_config": {"max_bytes": POOL_BYTES}}
    with LLM(str(folder), skip_tokenizer_init=True, program_cache=False, **sizes) as llm:
        prompts = torch.randint(0, 151936, (NUM_REQUESTS, NUM_IN), generator=torch.Generator().manual_seed(0)).tolist()
        started = time.perf_counter()
        outputs = llm.generate(prompts, SamplingParams(max_tokens=NUM_OUT, ignore_eos=True))
        seconds = time.perf_counter() - started
        timeline, runner, program = llm.compiled.timeline, llm.compiled.runner, llm.compiled.program
        weight_bytes = sum(program.parameter(name).nbytes for name in program.weights)
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where the model is, or will be written")
    parser.add_argument("--keep", action="store_true", help="do not delete the model afterwards")
    parser.add_argument("--part", choices=["write", "measure"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part == "write":
        write(args.folder)
    elif args.part == "measure":
        print(json.dumps(measure(args.folder), indent=2))
    else:
        folder = args.folder or Path(tempfile.mkdtemp(prefix="qwen3-0.6b-"))
        try:
            for part in ("write", "measure") if not (folder / "config.json").exists() else ("measure",):
                subprocess.run([sys.executable, __file__, "--folder", str(folder), "--part", part], check=True)
        finally:
            if not args.keep:
                shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
