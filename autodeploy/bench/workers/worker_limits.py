"""What the machine can do: the rate of a long read and of a large product of matrices, on all threads."""

import re
import time
from pathlib import Path
from typing import Any

import torch

from autodeploy import huge_pages

READ_BYTES = 1 << 30
SIZE = 3072
INTEGER_GAIN = 2
"""Products of bytes in the time of one of bfloat16, on CPUs that have instructions for both."""


def ready() -> dict[str, Any]:
    """Once torch is imported."""
    return {}


def measure(threads: int, dtype: str, seconds: float, bits: int = 16) -> dict[str, Any]:
    """Bytes and FLOP per second: the best of what is tried within so many seconds each.

    A model may be multiplied in its dtype or in float32, which is faster where a CPU has no products of 16 bits; with fewer bits
    than 16 as bytes too.
    """
    torch.set_num_threads(threads)
    products = {getattr(torch, dtype): 1, torch.float32: 1}
    if bits < 16:
        products = {getattr(torch, dtype): INTEGER_GAIN, torch.int8: 1}
    with torch.inference_mode():
        rates = [gain * flop_rate(kind, seconds) for kind, gain in products.items()]
        return {**read_rate(seconds), "flop_rate": max(rates)}


def read_rate(seconds: float) -> dict[str, Any]:
    """The sum of 1 GiB of float32: each number is read once. In pages of 4 KiB it takes 1.3 to 1.7 times as long."""
    numbers = huge_pages.empty([READ_BYTES // 4], torch.float32).fill_(1.0)
    pages = "huge" if bytes_in_huge_pages() > READ_BYTES / 2 else "small"
    return {"read_rate": READ_BYTES / best(numbers.sum, seconds), "pages": pages}


def bytes_in_huge_pages() -> int:
    """Of this process."""
    usage = Path("/proc/self/smaps_rollup")
    found = re.search(r"AnonHugePages:\s+(\d+) kB", usage.read_text()) if usage.exists() else None
    return int(found[1]) * 1024 if found else 0


def flop_rate(dtype: torch.dtype, seconds: float) -> float:
    a, b = torch.randn(SIZE, SIZE).to(dtype), torch.randn(SIZE, SIZE).to(dtype)
    multiply = torch.ops.aten._int_mm if dtype == torch.int8 else torch.nn.functional.linear
    return 2 * SIZE**3 / best(lambda: multiply(a, b), seconds)


def best(work: Any, seconds: float) -> float:
    """The least time of one call."""
    times, until = [], time.perf_counter() + seconds
    while not times or time.perf_counter() < until:
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return min(times)
