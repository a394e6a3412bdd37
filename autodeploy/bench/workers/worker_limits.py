"""What the machine can do: the rate of a long read and of a large product of matrices, on all threads."""

import mmap
import time
from typing import Any

import torch

from autodeploy.custom_ops.cpp import BuildError, Kernel, kernels

READ_BYTES = 1 << 30
SIZE = 3072
LINE = 16
"""Floats of a cache line; the totals of two threads lie so far apart."""
read = Kernel("read", "plpl")


def ready() -> dict[str, Any]:
    """Once torch is imported and the kernels are built."""
    kernels()
    return {}


def measure(threads: int, dtype: str, seconds: float) -> dict[str, Any]:
    """Bytes and FLOP per second: the best of what is tried within so many seconds each."""
    torch.set_num_threads(threads)
    with torch.inference_mode():
        return {**read_rate(threads, seconds), "flop_rate": flop_rate(getattr(torch, dtype), seconds)}


def read_rate(threads: int, seconds: float) -> dict[str, Any]:
    """Of 1 GiB of float32 in huge pages, by a loop in C++; without a compiler by `torch.sum`, which is slower."""
    numbers = in_huge_pages(READ_BYTES).fill_(1.0)
    if isinstance(kernels(), BuildError):
        return {"read_rate": READ_BYTES / best(numbers.sum, seconds), "read_by": "torch.sum"}
    rate = READ_BYTES / best(lambda: total_of(numbers, threads), seconds)
    return {"read_rate": rate, "read_by": "a C++ loop"}


def in_huge_pages(num_bytes: int) -> torch.Tensor:
    """Float32 numbers, in pages of 2 MiB where the system has them."""
    memory = mmap.mmap(-1, num_bytes)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.float32)


def total_of(numbers: torch.Tensor, threads: int) -> float:
    """The sum of float32 numbers, each read once. Their number is a multiple of 128."""
    totals = torch.zeros(threads, LINE)
    read(numbers.data_ptr(), numbers.numel(), totals.data_ptr(), threads)
    return totals[:, 0].sum().item()


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
