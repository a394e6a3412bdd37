"""How many threads may run at once in this process. No torch here."""

from __future__ import annotations

import ctypes
import os
from contextlib import suppress
from pathlib import Path

QUOTA = Path("/sys/fs/cgroup/cpu.max")


def available_cores(quota: Path = QUOTA) -> int:
    """Cores this process may use: by its affinity, and by the quota of its control group."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    limit, period = quota.read_text().split() if quota.exists() else ("max", "1")
    return allowed if limit == "max" else max(1, min(allowed, int(limit) // int(period)))


def end_idle_threads() -> None:
    """End the OpenMP threads that this thread has left waiting; they come back when it needs them again.

    libgomp lets waiting threads spin only while there are no more of them than cores: a second set, left over from loading, makes
    every parallel region of the executor's thread wait for the system to wake somebody (40 microseconds in place of 2).
    """
    with suppress(OSError, AttributeError):  # another OpenMP, or none
        ctypes.CDLL("libgomp.so.1").omp_pause_resource_all(1)
