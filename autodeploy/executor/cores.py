"""How many threads may run at once in this process. No torch here."""

from __future__ import annotations

import os
from pathlib import Path

QUOTA = Path("/sys/fs/cgroup/cpu.max")


def available_cores(quota: Path = QUOTA) -> int:
    """Cores this process may use: by its affinity, and by the quota of its control group."""
    allowed = len(os.sched_getaffinity(0))
    limit, period = quota.read_text().split() if quota.exists() else ("max", "1")
    return allowed if limit == "max" else max(1, min(allowed, int(limit) // int(period)))
