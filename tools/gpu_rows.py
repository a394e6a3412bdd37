"""Rows of a check, in a file as soon as they are known, and how time on a device is measured."""

from __future__ import annotations

import gc
import json
import os
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from autodeploy import CompiledModel
from autodeploy.executor.cuda_graphs import ladder
from autodeploy.executor.graph_device import CudaDevice, OnDeviceOnly
from autodeploy.executor.piecewise import token_ladder

POISON = ("CUDA error", "illegal memory access", "misaligned address", "device-side assert", "unspecified launch failure")
"""In errors after which the GPU answers a process no more."""
CALLS = 10
"""In the graph that is timed: one call alone is shorter than its launch."""


class Check:
    """One part's rows: each is in the file as soon as it is known."""

    def __init__(self, part: str, device: str, deadline: float, file: Path, resume: bool) -> None:
        self.part, self.device, self.deadline, self.file = part, device, deadline, file
        self.is_gpu = device.startswith("cuda")
        self.found: dict[str, Any] = {"part": part, "device": device, "environment": {}, "limits": {}, "rows": []}
        if resume and file.exists():
            self.found = json.loads(file.read_text())
        self.done = {row["name"] for row in self.found["rows"]}

    @property
    def seconds_left(self) -> float:
        return self.deadline - time.time()

    def write(self) -> None:
        self.file.write_text(json.dumps(self.found, indent=1) + "\n")

    def add(self, name: str, status: str, **facts: Any) -> None:
        self.found["rows"].append({"name": name, "status": status, **facts})
        self.done.add(name)
        self.write()
        shown = "  ".join(f"{key} {short(value)}" for key, value in facts.items() if isinstance(value, int | float | str))
        print(f"{status:<8} {name:<52} {shown}", flush=True)

    def skip(self, name: str, reason: str) -> None:
        if name not in self.done:
            self.add(name, "skipped", reason=reason)

    @contextmanager
    def row(self, name: str) -> Iterator[dict[str, Any]]:
        """Facts to fill in; "status" among them if it is not ok. An error makes a row that failed."""
        facts: dict[str, Any] = {}
        try:
            yield facts
        except Exception as error:
            text = f"{type(error).__name__}: {error}"
            where = traceback.format_tb(error.__traceback__)[-1].strip().splitlines()[0]
            self.add(name, "failed", **{**facts, "error": text[:2000], "where": where})
            if self.is_gpu and any(word in text for word in POISON):
                self.start_again()
        else:
            self.add(name, facts.pop("status", "ok"), **facts)

    def is_ok(self, name: str) -> bool:
        return any(row["name"] == name and row["status"] == "ok" for row in self.found["rows"])

    def wants(self, name: str, least: float = 0.0) -> bool:
        """Whether a row is still to be made; one for which there is no time is skipped."""
        if name in self.done:
            return False
        if self.seconds_left < least:
            self.skip(name, f"{self.seconds_left:.0f} s are left")
            return False
        return True

    def start_again(self) -> None:
        """The GPU answers this process no more: another one goes on."""
        print("the GPU is lost to this process; a new one goes on", flush=True)
        arguments = [word for word in sys.argv[1:] if word != "--resume" and not word.startswith("--deadline")]
        os.execv(sys.executable, [sys.executable, sys.argv[0], *arguments, "--resume", f"--deadline={self.deadline}"])


def short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def seconds_of(run: Callable[[], Any], device: str, repeats: int = 10) -> float:
    """Median seconds of a call on the device, after some that do not count; what is small may lie in the cache."""
    if not device.startswith("cuda"):
        started = time.perf_counter()
        run()
        return time.perf_counter() - started
    for _ in range(2):
        run()

    def several() -> None:
        for _ in range(CALLS):
            run()

    try:
        with OnDeviceOnly():
            run()
        replay = CudaDevice(device).capture(several)
    except RuntimeError:  # it waits for the device, and no graph can hold it
        return median_of_events(run, 3)
    return median_of_events(replay, repeats) / CALLS


def median_of_events(run: Callable[[], Any], repeats: int) -> float:
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2 * repeats)]
    for before, after in zip(events[::2], events[1::2], strict=True):
        before.record()  # pyright: ignore[reportCallIssue]
        run()
        after.record()  # pyright: ignore[reportCallIssue]
    torch.cuda.synchronize()
    pairs = zip(events[::2], events[1::2], strict=True)
    return statistics.median(before.elapsed_time(after) for before, after in pairs) / 1e3


def measure_limits(check: Check) -> dict[str, float]:
    """Bytes per second of a copy, read and written; FLOP per second of a bf16 product of matrices, on random numbers."""
    if not check.is_gpu:
        check.skip("limits of the card", "no GPU")
        return {}
    if not check.found["limits"]:
        source = torch.randn(1 << 30, device=check.device)
        target = torch.empty_like(source)
        copy = median_of_events(lambda: target.copy_(source), 20)
        del source, target
        a, b = (torch.randn(8192, 8192, device=check.device, dtype=torch.bfloat16) for _ in range(2))
        product = median_of_events(lambda: a @ b, 20)
        check.found["limits"] = {"bytes_per_s": 2 * 4 * (1 << 30) / copy, "flop_per_s": 2 * 8192**3 / product}
        check.add("limits of the card", "ok", **check.found["limits"])
    return check.found["limits"]


def free(check: Check) -> None:
    if check.is_gpu:
        gc.collect()
        torch.cuda.empty_cache()


def providers(compiled: CompiledModel) -> dict[str, str]:
    """Op -> the providers that were chosen for it."""
    chosen = compiled.program.providers
    return {op: ", ".join(sorted({choice.provider for choice in choices})) for op, choices in chosen.items()}


def switch_graphs(compiled: CompiledModel, on: bool) -> Any:
    """Have later steps use CUDA graphs or not; what runs them, None on a CPU."""
    graphs: Any = compiled.runner.graphs  # pyright: ignore[reportAttributeAccessIssue]
    if graphs is not None:
        graphs.sizes = ladder(graphs.options.max_batch_size) if on else ()
        if graphs.piecewise is not None:
            graphs.piecewise.sizes = token_ladder(graphs.options.max_num_tokens) if on else ()
    return graphs
