"""autodeploy itself: `load`, `run`."""

import threading
import time
from collections import deque
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import autodeploy
from autodeploy import LLM, SamplingParams
from autodeploy.specs import STATES, bytes_per_request, window_of_pool

llm: Any = None
clock: Any = None


class Stopwatch:
    """Stands where a request's detokenizer does, and notes when each token came."""

    text = ""

    def __init__(self, clock: "StepClock") -> None:
        self.clock, self.submitted, self.times = clock, 0.0, list[float]()

    def append(self, token_ids: Sequence[int]) -> str:
        self.times += self.clock.last(len(token_ids))
        return ""

    def finish(self) -> str:
        return ""


class StepClock:
    """When the tokens of the last steps were there: one time for all of a step. A request may get those of several at once."""

    def __init__(self, executor: Any) -> None:
        self.executor, self.ended, self.step, self.time = executor, deque[float](maxlen=1 << 16), -1, 0.0
        self._step = executor.step
        executor.step = self._timed_step

    def _timed_step(self) -> None:
        self._step()
        self.ended.append(time.perf_counter())

    def last(self, count: int) -> list[float]:
        if count > 1:
            return list(self.ended)[-count:]
        if self.step != self.executor.num_steps:
            self.step, self.time = self.executor.num_steps, time.perf_counter()
        return [self.time]


def load(model: str, threads: int, options: dict[str, Any]) -> dict[str, Any]:
    """torch takes its threads from the environment."""
    globals()["llm"] = LLM(model, skip_tokenizer_init=True, **options)
    globals()["clock"] = StepClock(llm.compiled.executor)
    versions = {"autodeploy": autodeploy.__version__, **{name: version(name) for name in ("torch", "transformers")}}
    return {"versions": versions}


def phases() -> dict[str, Any]:
    """Seconds of start-up so far, by phase."""
    timeline = llm.compiled.timeline
    return {"seconds": timeline.seconds, "cpu_seconds": timeline.cpu_seconds}


def facts() -> dict[str, Any]:
    """What the arithmetic needs of the model as compiled, and what it takes."""
    compiled = llm.compiled
    specs = compiled.program.caches.values()
    return {
        "kv": [[spec.bytes_per_unit(1), window_of_pool(spec.pool)] for spec in specs if spec.pool != STATES],
        "state_bytes": bytes_per_request(specs),
        "weight_bytes": compiled.program.weight_bytes,
        "pool_bytes": sum(cache.nbytes for cache in compiled.runner.caches),
    }


def run(prompts: list[list[int]], output_len: int, concurrency: int) -> dict[str, Any]:
    """Each of `concurrency` clients hands in the next prompt when its last one is done."""
    params = SamplingParams(max_tokens=output_len, ignore_eos=True)
    watches, waiting = [], iter(prompts)
    lock = threading.Lock()

    def client() -> None:
        while True:
            with lock:
                prompt = next(waiting, None)
                if prompt is None:
                    return
                watch = Stopwatch(clock)
                watches.append(watch)
                watch.submitted = time.perf_counter()
                handle = llm.compiled.submit(prompt, params, detokenizer=watch)
            handle.result()

    clients = [threading.Thread(target=client) for _ in range(concurrency)]
    for each in clients:
        each.start()
    for each in clients:
        each.join()
    return {"requests": [{"submitted": watch.submitted, "tokens": watch.times} for watch in watches]}
