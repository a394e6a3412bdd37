"""What the machine can do: the rate of a long read and of a large product of matrices, on all threads."""

import time
from typing import Any

import torch

READ_BYTES = 1 << 30
SIZE = 3072


def ready() -> dict[str, Any]:
    """Once torch is imported."""
    return {}


def measure(threads: int, dtype: str, seconds: float) -> dict[str, Any]:
    """Bytes and FLOP per second: the best of what is tried within so many seconds each."""
    torch.set_num_threads(threads)
    with torch.inference_mode():
        return {"read_rate": read_rate(seconds), "flop_rate": flop_rate(getattr(torch, dtype), seconds)}


def read_rate(seconds: float) -> float:
    """The sum of 1 GiB of float32: each number is read once."""
    numbers = torch.ones(READ_BYTES // 4)
    return READ_BYTES / best(numbers.sum, seconds)


def flop_rate(dtype: torch.dtype, seconds: float) -> float:
    a, b = torch.randn(SIZE, SIZE).to(dtype), torch.randn(SIZE, SIZE).to(dtype)
    return 2 * SIZE**3 / best(lambda: torch.nn.functional.linear(a, b), seconds)


def best(work: Any, seconds: float) -> float:
    """The least time of one call."""
    times, until = [], time.perf_counter() + seconds
    while not times or time.perf_counter() < until:
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return min(times)
