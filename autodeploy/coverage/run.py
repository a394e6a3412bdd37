"""Many model types, each in a process of its own: a hang or a crash of one does not end the run."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from multiprocessing.connection import Connection

from autodeploy.coverage.examine import Kind, Result, examine

TIMEOUT = 180.0
"""Seconds for one model type."""
GRACE = 5.0
"""Seconds a process has to tidy up after its result."""
PRELOADED = ["autodeploy.coverage.examine", "autodeploy._compile", "transformers.models.llama.modeling_llama"]


def examine_all(model_types: Sequence[str], jobs: int = 1, timeout: float = TIMEOUT) -> Iterator[Result]:
    """Results as they come."""
    with ThreadPoolExecutor(jobs) as pool:
        futures = [pool.submit(isolated, model_type, timeout) for model_type in model_types]
        yield from (future.result() for future in as_completed(futures))


def isolated(model_type: str, timeout: float = TIMEOUT, work: Callable[[str], Result] = examine) -> Result:
    """`work` in a process that is ended when it takes too long."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)  # imports take longer than a model does
    receiving, sending = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(sending, work, model_type), daemon=True)
    process.start()
    sending.close()
    try:
        if not receiving.poll(timeout):
            return Result(model_type, Kind.FAILED, f"no result after {timeout:.0f} s", seconds=timeout)
        result = receiving.recv()
        process.join(GRACE)
        return result
    except EOFError:
        process.join()
        return Result(model_type, Kind.FAILED, f"its process ended with code {process.exitcode}")
    finally:
        process.kill()
        process.join()


def _send(sending: Connection, work: Callable[[str], Result], model_type: str) -> None:
    with open(os.devnull, "w") as nowhere:  # what libraries print would tear the progress bar
        for stream in (sys.stdout, sys.stderr):
            os.dup2(nowhere.fileno(), stream.fileno())
    sending.send(work(model_type))
