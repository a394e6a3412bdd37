"""vLLM, its engine stepped by hand so that each step's tokens get their time. Prefix caching is off."""

import os
import sys
import time
from ctypes.util import find_library
from importlib import import_module
from pathlib import Path
from typing import Any

engine: Any = None


def load(model: str, threads: int, options: dict[str, Any]) -> dict[str, Any]:
    """The engine works in a process that vLLM starts, with the variables set here."""
    cores = sorted(os.sched_getaffinity(0))[:threads]
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", str(max(1, -(-options["pool_bytes"] // 2**30))))
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", ",".join(map(str, cores)))
    os.environ.setdefault("LD_PRELOAD", ":".join(filter(None, map(library, ("tcmalloc_minimal", "iomp5")))))
    vllm: Any = import_module("vllm")
    llm = vllm.LLM(
        model,
        skip_tokenizer_init=True,
        enable_prefix_caching=False,
        max_model_len=options["max_seq_len"],
        max_num_seqs=options["max_batch_size"],
    )
    globals()["engine"] = llm.llm_engine
    preloaded = " ".join(Path(path).name for path in os.environ["LD_PRELOAD"].split(":"))
    return {"versions": {"vllm": vllm.__version__, "torch": import_module("torch").__version__, "preloaded": preloaded}}


def library(name: str) -> str | None:
    """An allocator or OpenMP that vLLM is faster with: of this environment, or of the system; None where there is none."""
    found = sorted(Path(sys.prefix, "lib").glob(f"lib{name}.so*"))
    return str(found[0]) if found else find_library(name)


def run(prompts: list[list[int]], output_len: int, concurrency: int) -> dict[str, Any]:
    params: Any = import_module("vllm").SamplingParams(max_tokens=output_len, temperature=0.0, ignore_eos=True, detokenize=False)
    times: dict[str, dict[str, Any]] = {}
    waiting, active = list(enumerate(prompts)), 0
    while waiting or active:
        while waiting and active < concurrency:
            number, prompt = waiting.pop(0)
            times[str(number)] = {"submitted": time.perf_counter(), "tokens": []}
            engine.add_request(str(number), {"prompt_token_ids": prompt}, params)
            active += 1
        outputs = engine.step()
        now = time.perf_counter()
        for output in outputs:
            tokens = times[output.request_id]["tokens"]
            tokens += [now] * (len(output.outputs[0].token_ids) - len(tokens))
            active -= output.finished
    return {"requests": list(times.values())}
