"""What else the machine did during a run, and how much memory the measured processes took."""

from __future__ import annotations

import re
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Self

import psutil

QUIET = 0.25
"""Cores that others may use during a run before its figures are marked."""
SAMPLE, FAMILY = 0.02, 0.5
"""Seconds between two looks at the memory, and at which children there are."""


class Watch:
    """Around one run of a process: `foreign_cores` and `peak_anon_bytes` once it has ended."""

    def __init__(self, pid: int) -> None:
        self.foreign_cores, self.peak_anon_bytes = 0.0, 0
        self._process = psutil.Process(pid)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> Self:
        self._started = time.perf_counter(), busy_seconds(), self._own_seconds()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        started, busy, own = self._started
        others = (busy_seconds() - busy) - (self._own_seconds() - own)
        self.foreign_cores = max(others, 0.0) / (time.perf_counter() - started)

    def _own_seconds(self) -> float:
        """CPU seconds of the process, its children and this one."""
        return sum(cpu_seconds(process) for process in (*family(self._process), psutil.Process()))

    def _sample(self) -> None:
        members, looked = family(self._process), time.perf_counter()
        while True:
            self.peak_anon_bytes = max(self.peak_anon_bytes, sum(anon_bytes(member.pid) for member in members))
            if self._stop.wait(SAMPLE):
                return
            if time.perf_counter() - looked > FAMILY:
                members, looked = family(self._process), time.perf_counter()


def family(process: psutil.Process) -> list[psutil.Process]:
    """The process and all that it started; empty when it has ended."""
    with suppress(psutil.Error):
        return [process, *process.children(recursive=True)]
    return []


def busy_seconds() -> float:
    """CPU seconds of the whole machine, those included that a hypervisor took away."""
    times = psutil.cpu_times()
    return (
        sum(times) - times.idle - getattr(times, "iowait", 0.0) - getattr(times, "guest", 0.0) - getattr(times, "guest_nice", 0.0)
    )


def cpu_seconds(process: psutil.Process) -> float:
    """Of a process, with its children that have ended."""
    with suppress(psutil.Error):
        times = process.cpu_times()
        return times.user + times.system + times.children_user + times.children_system
    return 0.0


def anon_bytes(pid: int) -> int:
    """RssAnon of a process: resident memory that no file stands behind. 0 when it has ended."""
    with suppress(OSError):
        match = re.search(r"RssAnon:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
        return int(match[1]) * 1024 if match else 0
    return 0
