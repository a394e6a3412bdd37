"""Memory for a model's weights, asked of the system while torch is imported: finding pages and clearing them needs no Python.

It costs a second per 4 to 10 GB where pages are at hand, and ten times that on a virtual machine whose host took them back.
"""

from __future__ import annotations

import ctypes
import mmap
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import psutil

HUGE_PAGE = 1 << 21
PIECE = 32 * HUGE_PAGE
"""Bytes between two looks at whether somebody waits."""


class _Area:
    """Huge pages that a thread makes resident from the first to the last, and that are then given out in that order."""

    def __init__(self, num_bytes: int) -> None:
        self.area = mmap.mmap(-1, num_bytes + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.area.madvise(mmap.MADV_HUGEPAGE)
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(self.area))
        self._used = self._resident = -self._address % HUGE_PAGE
        self._end = self._resident + num_bytes
        self._is_wanted = threading.Event()
        self._thread = threading.Thread(target=self._touch, name="memory-ahead", daemon=True)
        self._thread.start()

    def _touch(self) -> None:
        """By writing: asked for with madvise, each piece would hold up all other mappings of the process, and so its imports."""
        while self._resident < self._end and not self._is_wanted.is_set():
            piece = min(PIECE, self._end - self._resident)
            ctypes.memset(self._address + self._resident, 0, piece)  # without the lock of the interpreter
            self._resident += piece

    def take(self, num_bytes: int) -> memoryview | None:
        """The next bytes, if so many are resident. From the first call on there will be no more of them."""
        self.stop()
        start = self._used
        if start + num_bytes > self._resident:
            return None
        self._used += -(-num_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
        return memoryview(self.area)[start : start + num_bytes]

    def stop(self) -> None:
        self._is_wanted.set()
        self._thread.join()

    def close(self) -> None:
        """Give back what nobody took."""
        self.stop()
        self.area.madvise(mmap.MADV_DONTNEED, self._used, len(self.area) - self._used)


_lock = threading.Lock()
_area: _Area | None = None


@contextmanager
def memory_ahead(num_bytes: int) -> Iterator[None]:
    """Meanwhile up to so many bytes become resident, and `take` gives them out; what is left at the end is given back.

    Nothing happens where the system has no huge pages or not as much memory, or where it is being done for another model.
    """
    global _area
    with _lock:
        is_idle = num_bytes >= HUGE_PAGE and _area is None and hasattr(mmap, "MADV_HUGEPAGE")
        if is_idle and num_bytes < psutil.virtual_memory().available:
            _area = mine = _Area(num_bytes)
        else:
            mine = None
    try:
        yield
    finally:
        if mine is not None:
            with _lock:
                _area = None
                mine.close()


def take(num_bytes: int) -> memoryview | None:
    """Memory that is resident already and holds zeros, to be kept; None where there is none."""
    with _lock:
        return None if _area is None else _area.take(num_bytes)
