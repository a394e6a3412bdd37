"""Hugging Face `generate`: sdpa, dynamic cache, `concurrency` prompts of equal length at a time."""

import time
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, GenerationConfig, StoppingCriteria, StoppingCriteriaList

model: Any = None


class Stopwatch(StoppingCriteria):
    """Asked after each step whether to stop: never, but the time is noted."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool)


def load(model: str, threads: int, options: dict[str, Any]) -> dict[str, Any]:
    torch.set_num_threads(threads)
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype="auto", attn_implementation="sdpa")
    loaded.generation_config.eos_token_id = None  # else it fills in for one that is not given
    globals()["model"] = loaded.eval()
    return {"versions": {"transformers": transformers.__version__, "torch": torch.__version__}}


def run(prompts: list[list[int]], output_len: int, concurrency: int) -> dict[str, Any]:
    config = GenerationConfig(max_new_tokens=output_len, do_sample=False, eos_token_id=None, pad_token_id=0)
    requests = []
    submitted = time.perf_counter()
    for start in range(0, len(prompts), concurrency):
        ids = torch.tensor(prompts[start : start + concurrency])
        watch = Stopwatch()
        with torch.inference_mode():
            criteria = StoppingCriteriaList([watch])
            model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config, stopping_criteria=criteria)
        requests += [{"submitted": submitted, "tokens": watch.times} for _ in ids]
        submitted = time.perf_counter()
    return {"requests": requests}
