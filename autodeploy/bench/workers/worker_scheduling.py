"""What a decode step costs besides the model: the executor's own loop, around a forward pass that takes no time.

Costs are CPU seconds of the loop's thread, so that other processes hardly count.
"""

import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from autodeploy.config import SamplingParams
from autodeploy.executor.batch import BatchBuilder, WantedRows
from autodeploy.executor.engine import ADExecutor
from autodeploy.executor.kv_cache import CacheManager, KVCacheManager
from autodeploy.executor.outputs import RequestHandle
from autodeploy.executor.request import Request
from autodeploy.executor.sampler import Sampler
from autodeploy.executor.scheduler import Scheduler
from autodeploy.specs import BatchMetadata

PAGE_SIZE = 32
VOCABULARY = 32
"""So small that sampling from it shows what a row costs, not what a logit does."""


@dataclass
class Costs:
    """CPU seconds of each step of so many requests that decode, from the end of a forward pass to the start of the next."""

    num_requests: int
    steps: list[float] = field(default_factory=list)


class NoModel:
    """In the place of a model runner: the same logits at once. Notes when it was left and entered."""

    rope_thresholds: tuple[int, ...] = ()
    can_chunk, reads_entries = True, False

    def __init__(self, costs: Costs) -> None:
        self.costs, self.logits = costs, torch.randn(costs.num_requests, VOCABULARY)
        self.left: float | None = None

    def allocate(self, num_units: Mapping[str, int], page_size: int) -> None:
        """There are no caches."""

    def forward(self, batch: BatchMetadata, rows: list[WantedRows]) -> Tensor:
        entered = time.thread_time()
        decodes_all = len(rows) == len(batch["input_ids"][0]) == self.costs.num_requests
        if decodes_all and self.left is not None:
            self.costs.steps.append(entered - self.left)
        self.left = time.thread_time() if decodes_all else None
        return self.logits[: len(rows)]

    def forget(self, request: Request) -> None:
        """Nothing is kept."""


def measure(num_requests: int, input_len: int, steps: int) -> dict[str, Any]:
    """Medians over the steps in which all requests decode, in seconds: their results waited for, and streamed."""
    kinds = {"waited for": False, "streamed": True}
    return {"seconds": {name: step_of(num_requests, input_len, steps, streaming) for name, streaming in kinds.items()}}


def step_of(num_requests: int, input_len: int, steps: int, streaming: bool) -> float:
    costs = Costs(num_requests)
    executor = executor_of(costs, input_len + steps + 2)
    params = SamplingParams(max_tokens=steps, ignore_eos=True)
    prompts = [Request(i, [i % VOCABULARY] * input_len, params, frozenset(), steps) for i in range(num_requests)]
    handles = [RequestHandle(request, None, streaming, executor.abort) for request in prompts]
    for handle in handles:
        executor.submit(handle)
    for handle in handles:
        handle.result()
    executor.shutdown()
    return statistics.median(costs.steps)


def executor_of(costs: Costs, length: int) -> ADExecutor:
    """With room for all requests of that length, and prompts computed in one step."""
    many = costs.num_requests
    kv = CacheManager({"kv": KVCacheManager(1 + many * -(-length // PAGE_SIZE), PAGE_SIZE)})
    scheduler, batches = Scheduler(kv, many, many * length, length), BatchBuilder(kv, many, many * length)
    return ADExecutor(NoModel(costs), scheduler, batches, Sampler(VOCABULARY))
