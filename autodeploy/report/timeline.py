"""Where start-up time goes: named phases with seconds, and a progress bar while they run."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext


def is_terminal() -> bool:
    """Whether somebody sees what is drawn on stderr."""
    try:
        return sys.stderr.isatty()
    except (AttributeError, ValueError):  # there is none, or it is closed
        return False


class Timeline:
    """Phases in the order in which they ran. show: draw progress on stderr; None draws when stderr is a terminal."""

    def __init__(self, show: bool | None = None) -> None:
        self.seconds: dict[str, float] = {}
        self.cpu_seconds: dict[str, float] = {}
        self.notes: dict[str, str] = {}
        """What else is to be told of a start, such as whether the program was a stored one."""
        self._is_shown = is_terminal() if show is None else show

    @contextmanager
    def phase(self, name: str, total: int | None = 1) -> Iterator[Callable[..., None]]:
        """Time one phase; the value is a function to call at each of its `total` steps (None: unknown)."""
        started, cpu_started = time.perf_counter(), time.process_time()
        try:
            with _bar(name, total) if self._is_shown else nullcontext(lambda *_: None) as advance:
                yield advance
        finally:
            self.seconds[name] = time.perf_counter() - started
            self.cpu_seconds[name] = time.process_time() - cpu_started

    def __str__(self) -> str:
        phases = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in self.seconds.items())
        return "; ".join([phases, *(f"{name}: {note}" for name, note in self.notes.items())])


@contextmanager
def _bar(name: str, total: int | None) -> Iterator[Callable[..., None]]:
    from rich.console import Console  # late: who sees no bar does not wait for it
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description:<20}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(name, total=total)
        yield lambda *_: progress.advance(task)
        if total is not None:
            progress.update(task, completed=total)
