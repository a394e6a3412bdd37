"""Hugging Face continuous batching. Never inside `torch.inference_mode()`: its thread would die unheard.

What `generate_batch` sets up in each call (about a second) is set up once here, and the cache has the size that is needed.
"""

import time
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig

PAGE = 256
"""Tokens; its default."""
PATIENCE = 300.0
"""Seconds without an answer after which it counts as dead."""
manager: Any = None


def load(model: str, threads: int, options: dict[str, Any]) -> dict[str, Any]:
    torch.set_num_threads(threads)
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype="auto", attn_implementation="sdpa").eval()
    most = options["max_batch_size"]
    limits = ContinuousBatchingConfig(
        page_size=PAGE,
        num_blocks=(most + 1) * -(-options["max_seq_len"] // PAGE) + 1,
        max_requests_per_batch=most,
        allow_block_sharing=False,
    )
    config = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0)
    globals()["manager"] = loaded.init_continuous_batching(config, limits)
    manager.start()
    return {"versions": {"transformers": transformers.__version__, "torch": torch.__version__}}


def run(prompts: list[list[int]], output_len: int, concurrency: int) -> dict[str, Any]:
    """The next prompt is handed in when one is done."""
    waiting, requests = list(prompts), dict[str, dict[str, Any]]()
    while waiting or any(not request["tokens"] for request in requests.values()):
        active = sum(not request["tokens"] for request in requests.values())
        for prompt in waiting[: concurrency - active]:
            submitted = time.perf_counter()
            name = manager.add_request(prompt, max_new_tokens=output_len, record_timestamps=True)
            requests[name] = {"submitted": submitted, "tokens": []}
        waiting = waiting[concurrency - active :]
        output = manager.get_result(timeout=PATIENCE)
        if output is None or output.error is not None:
            raise RuntimeError(f"no answer after {PATIENCE:.0f} s" if output is None else output.error)
        if output.is_finished():
            requests[output.request_id]["tokens"] = output.timestamps
    return {"requests": list(requests.values())}


def close() -> None:
    manager.stop(block=True, timeout=5)
