"""A rank that is killed or hangs under load: every request ends, nothing is left behind, and the exit code says so."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

import autodeploy
from tests.distributed.serve_under_load import NUM_REQUESTS, OPTIONS

ROOT = Path(__file__).parents[2]
TIMEOUT = 3.0


@dataclass
class Load:
    """A process under load, and its other rank."""

    process: subprocess.Popen[str]
    parent: int
    worker: int

    def hit(self, victim: str, number: signal.Signals) -> float:
        """Send a signal; when."""
        os.kill(getattr(self, victim), number)
        return time.time()

    def end(self, since: float, within: float) -> tuple[str, str]:
        """What it has written by its end, which comes in time, with nothing left behind."""
        output, errors = self.process.communicate(timeout=max(0.0, since + within - time.time()))
        assert self.process.returncode != 0
        wait_until(lambda: not psutil.pid_exists(self.worker), since + within - time.time())
        return output, errors


def wait_until(condition: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.fixture(scope="module", autouse=True)
def _stored_program(folder: Path, cache: Path) -> None:
    """Processes find it, and need not import transformers."""
    autodeploy.compile(folder, program_cache=cache, **OPTIONS).shutdown()


@pytest.fixture
def load(folder: Path, cache: Path) -> Iterator[Load]:
    shared = set(os.listdir("/dev/shm"))
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.distributed.serve_under_load", str(folder), str(cache), str(TIMEOUT)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    word, *pids = process.stdout.readline().split()
    assert word == "ready", process.communicate()[1]
    load = Load(process, *map(int, pids))
    yield load
    for victim in (load.worker, load.parent):
        if psutil.pid_exists(victim) and "autodeploy" in " ".join(psutil.Process(victim).cmdline()):
            os.kill(victim, signal.SIGKILL)
    process.wait()
    assert set(os.listdir("/dev/shm")) <= shared


def assert_all_failed(output: str, since: float, words: str, within: float) -> None:
    lines = output.splitlines()
    assert len(lines) == NUM_REQUESTS, output
    for line in lines:
        kind, at, _ = line.split(" ", 2)
        assert kind == "error" and "EngineDeadError" in line and words in line, line
        assert float(at) - since < within, line


def test_a_killed_rank_ends_every_request_and_the_process(load: Load) -> None:
    since = load.hit("worker", signal.SIGKILL)
    output, errors = load.end(since, 10)
    assert_all_failed(output, since, "rank 1 was killed by SIGKILL", 5)
    assert "EngineDeadError" in errors


def test_a_killed_rank_0_leaves_no_rank_behind(load: Load) -> None:
    load.end(load.hit("parent", signal.SIGKILL), 5)


def test_a_stopped_rank_is_hung_and_all_stacks_are_written(load: Load) -> None:
    since = load.hit("worker", signal.SIGSTOP)
    output, errors = load.end(since, TIMEOUT + 10)
    assert_all_failed(output, since, "longer than 3 s (distributed_timeout)", TIMEOUT + 5)
    assert "most recent call first" in errors and "distributed_runner.py" in errors


@pytest.mark.slow
def test_a_stopped_rank_0_is_killed(load: Load) -> None:
    load.end(load.hit("parent", signal.SIGSTOP), TIMEOUT + 5)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", range(40))
def test_kill_at_any_time(load: Load, seed: int) -> None:
    draw = random.Random(seed)
    time.sleep(draw.uniform(0, 2))
    victim = draw.choice(["worker", "parent"])
    since = load.hit(victim, signal.SIGKILL)
    output, _ = load.end(since, 10)
    if victim == "worker":
        assert_all_failed(output, since, "rank 1 was killed by SIGKILL", 5)
