"""Ranks as threads of one process, in step with each other: how the numbers of a sharded program are looked at."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor

from autodeploy.custom_ops.collectives import thread_group

T = TypeVar("T")


class ThreadGroup:
    """One rank's side of the exchange: each call waits for the same one of all others."""

    def __init__(self, rank: int, barrier: threading.Barrier, given: list[Any]) -> None:
        self.rank, self.barrier, self.given = rank, barrier, given

    def gather(self, x: Tensor) -> list[Tensor]:
        self.given[self.rank] = x.clone()
        self.barrier.wait()
        found = list(self.given)
        self.barrier.wait()  # nobody may go on and give the next one before all have taken this one
        return found

    def add_up(self, total: Tensor) -> None:
        first, *others = self.gather(total)
        total.copy_(sum(others, start=first))


def run_ranks(num_ranks: int, work: Callable[[int], T]) -> list[T]:
    """What `work(rank)` gives on each rank. The first error of a rank is raised, and ends the others."""
    barrier, given = threading.Barrier(num_ranks), [None] * num_ranks
    results, errors = dict[int, T](), list[BaseException]()

    def run(rank: int) -> None:
        try:
            with thread_group(ThreadGroup(rank, barrier, given)):
                results[rank] = work(rank)
        except BaseException as error:
            if not isinstance(error, threading.BrokenBarrierError):
                errors.append(error)
            barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(num_ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return [results[rank] for rank in range(num_ranks)]
