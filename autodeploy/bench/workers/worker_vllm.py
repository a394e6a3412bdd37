"""vLLM, its engine stepped by hand so that each step's tokens get their time. Prefix caching is off."""

import os
import time
from importlib import import_module
from typing import Any

engine: Any = None


def load(model: str, threads: int, options: dict[str, Any]) -> dict[str, Any]:
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", str(max(1, -(-options["pool_bytes"] // 2**30))))
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", f"0-{threads - 1}")
    vllm: Any = import_module("vllm")
    llm = vllm.LLM(
        model,
        skip_tokenizer_init=True,
        enable_prefix_caching=False,
        max_model_len=options["max_seq_len"],
        max_num_seqs=options["max_batch_size"],
    )
    globals()["engine"] = llm.llm_engine
    return {"versions": {"vllm": vllm.__version__, "torch": import_module("torch").__version__}}


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
