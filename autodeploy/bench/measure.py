"""The runs of one command: engines are started, and take turns."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

from autodeploy.bench.ceilings import Machine, ModelSize
from autodeploy.bench.metrics import RequestTimes, RunTimes
from autodeploy.bench.peers import OURS, ROUND, Engine
from autodeploy.bench.results import EngineResult, Results, Run
from autodeploy.bench.watch import QUIET, Watch
from autodeploy.bench.worker import Worker, WorkerError
from autodeploy.bench.workload import Cell, longest, most_tokens
from autodeploy.errors import AutoDeployError

LIMIT_SECONDS = 0.5
"""For each look at a limit; they are measured before and after each run of ours, and the better look counts."""
CACHE = "AUTODEPLOY_CACHE_DIR"
SCHEMES: dict[int, dict[str, str]] = {16: {}, 8: {"quantization": "w8a8"}, 4: {"quantization": "int4"}}
"""Bits of a weight -> options of `LLM`."""
PAGE_SLACK = 64
"""Tokens of room per request in the pool beside those it has."""


@dataclass(frozen=True)
class Task:
    """What a command measures. say: told what goes on. options: those of `LLM` that the user gave."""

    model: str
    cells: Sequence[Cell]
    threads: int
    repeats: int
    say: Callable[[str], None]
    warn: Callable[[str], None]
    peers: Sequence[Engine] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    bits: int = 16
    """Of a weight; with fewer than 16 each engine rounds the checkpoint's by means of its own."""

    @property
    def llm_options(self) -> dict[str, Any]:
        """For autodeploy: a pool and a batch that the cells fit in, unless the user says otherwise."""
        most = max(cell.concurrency for cell in self.cells)
        sizes: dict[str, Any] = {
            "max_seq_len": longest(self.cells),
            "max_batch_size": most,
            "kv_cache_config": {"max_tokens": most_tokens(self.cells) + most * PAGE_SLACK, "free_memory_fraction": 0.9},
        }
        return {**sizes, **SCHEMES[self.bits], **self.options}


@dataclass
class Started:
    """An engine whose process runs."""

    engine: Engine
    result: EngineResult
    worker: Worker | None = None

    def watched(self, do: str, **arguments: Any) -> tuple[dict[str, Any], float]:
        """Have the process do something; what it answers, and the cores that others used meanwhile."""
        assert self.worker is not None
        with Watch(self.worker.pid) as watch:
            answer = self.worker.ask(do, **arguments)
        self.result.peak_anon_bytes = max(self.result.peak_anon_bytes, watch.peak_anon_bytes)
        return answer, watch.foreign_cores

    def run(self, prompts: list[list[int]], cell: Cell) -> Run:
        """One run. Raises WorkerError when it is not the work that was asked for."""
        answer, foreign = self.watched("run", prompts=prompts, output_len=cell.output_len, concurrency=cell.concurrency)
        requests = tuple(RequestTimes(each["submitted"], tuple(each["tokens"])) for each in answer["requests"])
        made = [len(request.tokens) for request in requests]
        if made != [cell.output_len] * len(prompts):
            wanted = f"{len(prompts)} requests of {cell.output_len} tokens each"
            raise WorkerError(f"{self.engine.name}: {wanted} were asked for, but {made[:8]} came")
        return Run(RunTimes(requests), foreign, bool(answer.get("spread_evenly")))


def measure(task: Task) -> Results:
    """Start every engine, let them take turns in each cell, A B A B, and measure the machine in between."""
    with ExitStack() as processes:
        limits = processes.enter_context(Worker("limits", environment=threads_of(task)))
        size = sizes(task)
        machine = _limits(task, limits, size["dtype"])
        ours = start(task, _ours(task, processes), processes, size)
        if ours.result.error:
            raise WorkerError(ours.result.error)
        facts = {**size, **ours.watched("facts")[0]}
        started = [ours, *(start(task, peer, processes, facts) for peer in task.peers)]
        for number, cell in enumerate(task.cells):
            for repeat in range(task.repeats):
                prompts, where = (
                    cell.prompts(facts["vocab_size"], repeat),
                    f"run {repeat + 1} of {task.repeats}, cell {number + 1}",
                )
                before = _limits(task, limits, size["dtype"])
                found = _take_turn(task, ours, cell, prompts, where)
                around = before.best_with(_limits(task, limits, size["dtype"]))
                ours.result.add(cell, found and replace(found, limits=around))
                machine = machine.best_with(around)
                for each in started[1:]:
                    each.result.add(cell, _take_turn(task, each, cell, prompts, where))
        numbers = {name: size[name] for name in ("body_numbers", "head_numbers", "weight_bytes", "attention_flop")}
        caches = tuple((bytes_, window) for bytes_, window in facts["kv"])
        return Results(
            task.model,
            list(task.cells),
            task.threads,
            machine,
            ModelSize(**numbers, kv=caches, state_bytes=facts["state_bytes"]),
            [each.result for each in started],
            facts["weight_bytes"],
            facts["pool_bytes"],
        )


def _ours(task: Task, processes: ExitStack) -> Engine:
    """Beside others it starts with an empty cache, so that its first start is one."""
    if not task.peers:
        return Engine(OURS)
    cache = processes.enter_context(tempfile.TemporaryDirectory(prefix="autodeploy-bench-"))
    return Engine(OURS, environment={CACHE: cache})


def threads_of(task: Task) -> dict[str, str]:
    """Variables that give an engine its threads."""
    return {"OMP_NUM_THREADS": str(task.threads), "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}


def sizes(task: Task) -> dict[str, Any]:
    """Of the model; with fewer bits its bytes as if no scales belonged to them."""
    with Worker("model") as worker:
        size = worker.ask("size", model=os.fspath(task.model))
    if task.bits != 16:
        size["weight_bytes"] = (size["body_numbers"] + size["head_numbers"]) * task.bits // 8
    return size


def _limits(task: Task, worker: Worker, dtype: str) -> Machine:
    task.say("the machine's limits")
    worker.ask("ready")
    with Watch(worker.pid) as watch:
        found = worker.ask("measure", threads=task.threads, dtype=dtype, seconds=LIMIT_SECONDS, bits=task.bits)
    return Machine(found["read_rate"], found["flop_rate"], watch.foreign_cores > QUIET, found["pages"], (found["read_rate"],))


def start(task: Task, engine: Engine, processes: ExitStack, facts: Mapping[str, Any]) -> Started:
    """Start an engine's process and have it make one token. What goes wrong is its result's `error`."""
    started = Started(engine, EngineResult(engine.name))
    environment = {**threads_of(task), **engine.environment}
    try:
        if task.bits != 16 and engine.name not in ROUND:
            raise WorkerError(f"{engine.name}: it has no means of its own to round weights to {task.bits} bits")
        if engine.needs_preparation:
            task.say(f"{engine.name}: converting the checkpoint")
            with Worker(engine.worker, engine.python, environment) as worker:
                worker.ask("prepare", model=task.model, bits=task.bits)
        if engine.compiles and task.peers:
            started.result.first_start_seconds = _first_start(task, engine, environment, facts)
        task.say(f"{engine.name}: starting")
        started.worker = processes.enter_context(Worker(engine.worker, engine.python, environment))
        _first_token(task, started, started.worker.started, facts)
    except AutoDeployError as error:
        started.result.error = str(error)
        task.warn(str(error))
    return started


def _first_start(task: Task, engine: Engine, environment: Mapping[str, str], facts: Mapping[str, Any]) -> float | None:
    """Seconds to the first token in a process that ends then, and leaves what it compiled to the next."""
    task.say(f"{engine.name}: starting for the first time")
    with Worker(engine.worker, engine.python, environment) as worker:
        first = Started(engine, EngineResult(engine.name), worker)
        _first_token(task, first, worker.started, facts)
    return first.result.first_token_seconds


def _first_token(task: Task, started: Started, since: float, facts: Mapping[str, Any]) -> None:
    """since: when the process was started."""
    result, options = started.result, task.llm_options
    if started.engine.name != OURS:
        pool = most_tokens(task.cells) * sum(size for size, _ in facts["kv"])
        options = {
            "bits": task.bits,
            "pool_bytes": pool,
            "max_seq_len": longest(task.cells),
            "max_batch_size": options["max_batch_size"],
        }
    answer, foreign = started.watched("load", model=task.model, threads=task.threads, options=options)
    result.versions, result.load_seconds = answer["versions"], answer["at"] - since
    one = Cell(1, task.cells[0].input_len, 1, 1)
    run = started.run(one.prompts(facts["vocab_size"], -1), one)
    result.first_token_seconds = run.times.requests[0].tokens[0] - since
    result.is_noisy_start = max(foreign, run.foreign_cores) > QUIET
    if result.is_noisy_start:
        task.warn(noise(f"{started.engine.name}, start", max(foreign, run.foreign_cores)))


def _take_turn(task: Task, started: Started, cell: Cell, prompts: list[list[int]], where: str) -> Run | None:
    """One run of one engine; after a failure it is left out."""
    if started.result.error:
        return None
    task.say(f"{started.engine.name}: {cell} ({where})")
    try:
        run = started.run(prompts, cell)
    except WorkerError as error:
        started.result.error = str(error)
        task.warn(str(error))
        return None
    if run.is_noisy:
        task.warn(noise(f"{started.engine.name}, {cell}", run.foreign_cores))
    return run


def noise(what: str, foreign_cores: float) -> str:
    return f"{what}: other processes used {foreign_cores:.2f} cores meanwhile; the figure is marked *"
