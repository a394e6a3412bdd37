"""A rank other than 0: loads its share of a program, then does what rank 0 says until it is told to end.

Started as `python -m autodeploy.executor.worker` with what `launch.Spawned` holds, as JSON. transformers is never imported here.
"""

from __future__ import annotations

import ctypes
import faulthandler
import importlib
import json
import os
import select
import signal
import socket
import sys
import threading
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors.torch import load

from autodeploy.checkpoint import CheckpointSource
from autodeploy.distributed.channel import Channel
from autodeploy.distributed.groups import join, leave
from autodeploy.distributed.launch import Place, local_device
from autodeploy.distributed.messages import Allocate, Capture, Failed, Forward, Ready, Shutdown, Start, digest_of, mesh_of
from autodeploy.distributed.ranks import Stopwatch, is_stopped
from autodeploy.errors import ProgramFileError
from autodeploy.executor.cuda_graphs import GraphOptions
from autodeploy.executor.distributed_runner import load_rank, share_cores
from autodeploy.executor.memory import free_memory
from autodeploy.executor.model_runner import ModelRunner
from autodeploy.executor.packing import returning_blocks
from autodeploy.executor.staged_steps import Forward as StepForward
from autodeploy.executor.staged_steps import forward_of
from autodeploy.program import decode_program

TICK = 0.5
SLACK = 1.0
"""Seconds that this rank gives a step more than rank 0 does, which knows more of the others."""
PR_SET_PDEATHSIG = 1


def main() -> None:
    told: dict[str, Any] = json.loads(sys.argv[1])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for rank 0, which ends this one
    _die_with(told["parent"])
    serve(Channel(socket.socket(fileno=told["socket"])), told["rank"], Place(**told["place"]), told["parent"])
    os._exit(0)  # the interpreter's own end takes a second


def _die_with(parent: int) -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it has died before
        os._exit(1)


def serve(channel: Channel, rank: int, place: Place, parent: int = 0) -> None:
    """Until rank 0 says that it is over; the process ends when rank 0 is gone, or a step fails or hangs.

    parent: the process of rank 0, where it has started this one.
    """
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    watch = Watch(channel, parent)
    try:
        start: Start = channel.receive()
        watch.timeout = start.timeout + SLACK
        runner, device = _load(start, rank, place)
        room = free_memory(device) // (place.num_local if device == "cpu" else 1)
        channel.send(Ready(digest_of(start.program), runner.weight_bytes, room))
        channel.receive()  # `Join`: the others are ready too
        mesh = mesh_of(start)
        ends = join(mesh, rank, device, start.rendezvous, start.timeout)
        del start
        _follow(channel, runner, forward_of(runner, mesh, rank, ends), watch)
        leave()
        watch.end()
        channel.close()
    except ConnectionError:
        os._exit(1)
    except Exception as error:
        traceback.print_exc()
        with suppress(OSError):
            channel.send(Failed(f"{type(error).__name__}: {error}"))
        os._exit(1)


def _load(start: Start, rank: int, place: Place) -> tuple[ModelRunner, str]:
    if digest_of(start.program) != start.digest:
        raise ProgramFileError("the program is not the one of rank 0")
    for name in start.modules:
        importlib.import_module(name)
    share_cores(place.num_local)
    device, source = local_device(start.device, place), CheckpointSource(Path(start.folder))
    source.initial = load(start.initial)
    graphs = GraphOptions(start.graph_size)
    with returning_blocks():
        return load_rank(decode_program(start.program), source, mesh_of(start), rank, device, graphs), device


def _follow(channel: Channel, runner: ModelRunner, forward: StepForward, watch: Watch) -> None:
    while True:
        match channel.receive():
            case Forward() as step:
                with watch.step():
                    forward(step.batch, [])
            case Allocate(num_units, page_size):
                runner.allocate(num_units, page_size)
            case Capture(num_pages):
                assert runner.graphs is not None
                runner.graphs.capture_all(num_pages)
            case Shutdown():
                return
            case other:
                raise ValueError(f"rank 0 says {type(other).__name__}")


class Watch:
    """A thread that ends the process when rank 0 is gone or a step hangs, whatever the main thread waits for.

    parent: the process of rank 0, where it has started this one. When it is stopped for as long as a step may take it is killed,
    because its requests wait for ever.
    """

    def __init__(self, channel: Channel, parent: int) -> None:
        self.timeout = float("inf")
        self._channel, self._parent = channel, parent
        self._is_over = False
        self._step = Stopwatch(2 * TICK)
        threading.Thread(target=self._run, name="ad-watch", daemon=True).start()

    def step(self) -> Stopwatch:
        """A context manager: a step is under way."""
        return self._step

    def end(self) -> None:
        """Rank 0 may go now."""
        self._is_over = True

    def _run(self) -> None:
        poll = select.poll()
        poll.register(self._channel, select.POLLRDHUP)
        stopped = 0
        while not self._is_over:
            if poll.poll(TICK * 1000) and not self._is_over:
                os._exit(1)
            stopped = stopped + 1 if is_stopped(self._parent) else 0
            if max(self._step.look(), stopped * TICK) > self.timeout:
                self._end_hanging()

    def _end_hanging(self) -> None:
        faulthandler.dump_traceback(file=2)
        if is_stopped(self._parent):
            with suppress(ProcessLookupError):
                os.kill(self._parent, signal.SIGKILL)
        os._exit(1)


if __name__ == "__main__":
    main()
