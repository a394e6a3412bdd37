"""How the other ranks come to be: processes of this machine, or ranks that torchrun has started beside this one."""

from __future__ import annotations

import json
import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch

from autodeploy.distributed.channel import PATIENCE, Channel, accept
from autodeploy.distributed.groups import ENVIRONMENT, torchrun_store
from autodeploy.distributed.messages import Hello, build
from autodeploy.distributed.ranks import Peer
from autodeploy.errors import ConfigError, EngineDeadError

WORKER = "autodeploy.executor.worker"
TO_CONNECT = 120.0
"""Seconds that a rank has at least: it imports torch first."""
CONTROL = "autodeploy/control"
"""Where in torchrun's store rank 0 says how it is reached."""


@dataclass(frozen=True)
class Place:
    """Of a rank on its machine."""

    gpu: int = 0
    """The number of its GPU."""
    num_local: int = 1
    """Ranks on the machine."""


@dataclass(frozen=True)
class Launch:
    """A way to start ranks."""

    place: Place
    """Of rank 0."""
    rendezvous: str
    start: Callable[[], Sequence[Peer]]
    close: Callable[[], object] = lambda: None
    """Gives back what the ranks met in."""


@dataclass(frozen=True)
class Spawned:
    """What a process that was started as a rank is told at once; `Start` says the rest."""

    rank: int
    socket: int
    parent: int
    place: Place


def launch_processes(size: int, device: str) -> Launch:
    """The others are processes of this machine. What all meet in is memory, so that nothing stays and no port is open.

    Raises ConfigError where there are too few GPUs.
    """
    if device == "cuda" and (count := torch.cuda.device_count()) < size:
        raise ConfigError(f"{size} ranks need as many GPUs, and this machine has {count}. Lower the parallel sizes.")
    store = os.memfd_create("autodeploy-ranks")

    def start() -> list[Peer]:
        try:
            return [_spawn(rank, size, store) for rank in range(1, size)]
        except OSError as error:
            raise EngineDeadError(f"a rank could not be started: {error}") from error

    return Launch(Place(0, size), f"file:///proc/self/fd/{store}", start, lambda: os.close(store))


def _spawn(rank: int, size: int, store: int) -> Peer:
    mine, theirs = socket.socketpair()
    with theirs:
        told = json.dumps(asdict(Spawned(rank, theirs.fileno(), os.getpid(), Place(rank, size))))
        path = os.pathsep.join(os.path.abspath(folder) for folder in sys.path)  # what is imported here, as it is there
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", WORKER, told],
            pass_fds=[theirs.fileno(), store],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": path},
        )
    return Peer(rank, Channel(mine), process.kill, process)


def is_under_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1


def torchrun_rank(size: int) -> int:
    """Of this process. Raises ConfigError where torchrun has not started so many."""
    missing = [name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise ConfigError(
            f"distributed_executor_backend='torchrun' needs {', '.join(missing)} in the environment, as torchrun sets them. "
            f"Start the script with torchrun --nproc-per-node {size}, or leave the option out."
        )
    if int(os.environ["WORLD_SIZE"]) != size:
        raise ConfigError(
            f"torchrun has started {os.environ['WORLD_SIZE']} processes, but tensor_parallel_size x pipeline_parallel_size is "
            f"{size}. Start {size}, or change the sizes."
        )
    return int(os.environ["RANK"])


def torchrun_place() -> Place:
    return Place(int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def launch_under_torchrun(size: int, timeout: float) -> Launch:
    """The others run the same script, and come to `connect_under_torchrun`. Raises ConfigError where torchrun is not there."""
    torchrun_rank(size)
    store = torchrun_store()
    if store.add(f"{CONTROL}/starts", 1) > 1:
        raise ConfigError("under torchrun one engine can be made: the other ranks have ended with the first. Run torchrun again.")

    def start() -> list[Peer]:
        host, token = own_address(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])), secrets.token_hex(32)
        with listen(host, max(timeout, TO_CONNECT)) as listener:
            store.set(CONTROL, json.dumps([host, listener.getsockname()[1], token]))
            return accept_all(listener, token, size)

    return Launch(torchrun_place(), ENVIRONMENT, start)


def connect_under_torchrun(rank: int) -> Channel:
    """To rank 0, however long it compiles."""
    store = torchrun_store()
    while not store.check([CONTROL]):
        time.sleep(0.1)
    host, port, token = json.loads(store.get(CONTROL))
    return connect(host, port, token, rank)


def own_address(host: str, port: int) -> str:
    """The address of this machine by which those see it that see `host`."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, port))
        return probe.getsockname()[0]


def listen(host: str, timeout: float) -> socket.socket:
    listener = socket.create_server((host, 0))
    listener.settimeout(timeout)
    return listener


def accept_all(listener: socket.socket, token: str, size: int) -> list[Peer]:
    """Every other rank, once it has connected. Raises EngineDeadError when one does not come, or is of another version."""
    peers: dict[int, Peer] = {}
    while len(peers) < size - 1:
        try:
            channel, hello = accept(listener, token)
        except TimeoutError:
            absent = sorted(set(range(1, size)) - peers.keys())
            raise EngineDeadError(f"ranks {absent} have not connected in {listener.gettimeout():g} s") from None
        if hello.build != build():
            raise EngineDeadError(f"rank {hello.rank} has {hello.build}, and rank 0 {build()}. Install the same on all machines.")
        peers[hello.rank] = Peer(hello.rank, channel, channel.hang_up)
    return [peers[rank] for rank in sorted(peers)]


def connect(host: str, port: int, token: str, rank: int) -> Channel:
    channel = Channel(socket.create_connection((host, port), PATIENCE))
    channel.socket.settimeout(None)
    channel.send(Hello(rank, token, build()))
    return channel


def local_device(device: str, place: Place) -> str:
    """A rank's own: each has a GPU to itself."""
    return f"cuda:{place.gpu}" if device == "cuda" else device
