"""Where the time goes from the start of a process to its first token."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from autodeploy.bench.measure import CACHE, Task, noise, threads_of
from autodeploy.bench.metrics import RequestTimes
from autodeploy.bench.peers import OURS
from autodeploy.bench.watch import QUIET, Watch
from autodeploy.bench.worker import Worker
from autodeploy.bench.workload import Cell

TOTAL, REST = "process start to first token", "all else"


@dataclass(frozen=True)
class Start:
    """One start: seconds of each phase, in order; CPU seconds of those that are the compiler's and the loader's own."""

    seconds: dict[str, float]
    cpu_seconds: dict[str, float]
    foreign_cores: float
    peak_anon_bytes: int


def measure_starts(task: Task, vocab_size: int) -> list[Start]:
    """A new process each time: one with an empty cache, which builds kernels and program, then as many as are asked for."""
    starts = []
    with tempfile.TemporaryDirectory(prefix="autodeploy-bench-") as cache:
        for repeat in range(1 + task.repeats):
            what = f"start {repeat} of {task.repeats}" if repeat else "the first start"
            task.say(what)
            starts.append(_start(task, vocab_size, cache))
            if starts[-1].foreign_cores > QUIET:
                task.warn(noise(what, starts[-1].foreign_cores))
    return starts


def _start(task: Task, vocab_size: int, cache: str) -> Start:
    cell = task.cells[0]
    with Worker(OURS, environment=threads_of(task) | {CACHE: cache}) as worker:
        with Watch(worker.pid) as watch:
            loaded = worker.ask("load", model=task.model, threads=task.threads, options=task.llm_options)
            answer = worker.ask("run", prompts=cell.prompts(vocab_size, 0), output_len=1, concurrency=1)
        phases = worker.ask("phases")
    request = RequestTimes(answer["requests"][0]["submitted"], tuple(answer["requests"][0]["tokens"]))
    seconds = seconds_of(worker.started, loaded, phases["seconds"], request)
    return Start(seconds, phases["cpu_seconds"], watch.foreign_cores, watch.peak_anon_bytes)


def seconds_of(started: float, loaded: dict[str, Any], phases: dict[str, float], request: RequestTimes) -> dict[str, float]:
    """All phases; what lies between them is `REST`, and the last is the sum."""
    seconds = {
        "start of Python": loaded["begun"] - started,
        "imports": loaded["imported"] - loaded["begun"],
        **phases,
        "first token": request.ttft,
    }
    total = request.tokens[0] - started
    return {**seconds, REST: total - sum(seconds.values()), TOTAL: total}


def medians(starts: Sequence[Start]) -> Start:
    """Of each phase by itself; memory is the most of all starts, noise too."""
    return Start(
        _medians([start.seconds for start in starts]),
        _medians([start.cpu_seconds for start in starts]),
        max(start.foreign_cores for start in starts),
        max(start.peak_anon_bytes for start in starts),
    )


def _medians(figures: Sequence[dict[str, float]]) -> dict[str, float]:
    return {name: statistics.median(each[name] for each in figures) for name in figures[0]}


def cells_for(input_len: int) -> list[Cell]:
    """One prompt, one token."""
    return [Cell(1, input_len, 1, 1)]
