"""Ranks that Ray starts, on one machine or several. Ray finds them room and ends them; the rest goes past it.

Rank 0 stays the process that asks; an actor of its own only keeps its room. What crosses Ray is text.
"""

from __future__ import annotations

import importlib
import json
import os
import secrets
import socket
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

import torch.distributed as dist

from autodeploy.distributed.launch import TO_CONNECT, WORKER, Launch, Place, accept_all, connect, listen
from autodeploy.distributed.ranks import Peer
from autodeploy.errors import ConfigError


class Seat:
    """An actor: the room of one rank, and the rank itself unless it is rank 0."""

    def where(self) -> str:
        import ray

        return json.dumps([ray.get_runtime_context().get_node_id(), ray.get_gpu_ids()])

    def serve(self, told: str) -> str:
        rank, host, port, token, num_local = json.loads(told)
        importlib.import_module(WORKER).serve(connect(host, port, token, rank), rank, Place(0, num_local))  # one GPU is visible
        return "over"


def launch_with_ray(size: int, device: str, timeout: float) -> Launch:
    """Raises ConfigError where Ray is not there or has no room."""
    ray, owns = _ray()
    host = ray.util.get_node_ip_address()
    group = _room(ray, size, device, host, timeout)
    strategy = ray.util.scheduling_strategies.PlacementGroupSchedulingStrategy
    needs = {"num_gpus": 1} if device == "cuda" else {}
    actor = ray.remote(Seat)
    seats = [
        actor.options(num_cpus=1, **needs, scheduling_strategy=strategy(group, placement_group_bundle_index=i)).remote()
        for i in range(size)
    ]
    nodes, gpus = zip(*(json.loads(text) for text in ray.get([seat.where.remote() for seat in seats])), strict=True)
    num_local = [Counter(nodes)[node] for node in nodes]
    store, port = _store(host)

    def start() -> list[Peer]:
        token = secrets.token_hex(32)
        with listen(host, max(timeout, TO_CONNECT)) as listener:
            for rank in range(1, size):
                seats[rank].serve.remote(json.dumps([rank, host, listener.getsockname()[1], token, num_local[rank]]))
            peers = accept_all(listener, token, size)
        for peer in peers:
            peer.kill = _killer(ray, seats[peer.rank], peer.kill)
        return peers

    place = Place(_visible(gpus[0][0]) if gpus[0] else 0, num_local[0])
    return Launch(place, f"tcp://{host}:{port}", start, partial(_close, ray, seats, group, owns, [store]))


def _ray() -> tuple[Any, bool]:
    """Ray, connected; whether by us."""
    try:
        import ray
        import ray.util.scheduling_strategies
    except ImportError as error:
        raise ConfigError(
            "distributed_executor_backend='ray' needs Ray, which is not installed: pip install 'autodeploy[ray]'"
        ) from error
    if owns := not ray.is_initialized():
        ray.init()  # the cluster of this machine or of RAY_ADDRESS, if there is one
    return ray, owns


def _room(ray: Any, size: int, device: str, host: str, timeout: float) -> Any:
    """A bundle for each rank, the first one on this machine."""
    each = {"CPU": 1.0, **({"GPU": 1.0} if device == "cuda" else {})}
    here = {**each, f"node:{host}": 0.001}
    group = ray.util.placement_group([here, *([each] * (size - 1))], strategy="PACK")
    if not group.wait(timeout):
        ray.util.remove_placement_group(group)
        kind = "GPU" if device == "cuda" else "CPU"
        raise ConfigError(
            f"Ray has no room for {size} ranks with a {kind} each after {timeout:g} s (distributed_timeout), one of them on this "
            f"machine: {ray.available_resources().get(kind, 0):g} of {ray.cluster_resources().get(kind, 0):g} are free. "
            "Add nodes, or lower the sizes."
        )
    return group


def _store(host: str) -> tuple[Any, int]:
    """What the ranks meet in; it listens at the address that Ray knows, and nowhere else."""
    listener = socket.create_server((host, 0))
    port = listener.getsockname()[1]
    store = dist.TCPStore(  # pyright: ignore[reportPrivateImportUsage]
        host, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach()
    )
    return store, port


def _killer(ray: Any, seat: Any, hang_up: Callable[[], object]) -> Callable[[], object]:
    def kill() -> None:
        hang_up()
        with suppress(Exception):  # whatever Ray says: it may be gone itself
            ray.kill(seat)

    return kill


def _visible(gpu: int) -> int:
    """The number that torch gives one of this machine's GPUs."""
    listed = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return listed.split(",").index(str(gpu)) if listed else int(gpu)


def _close(ray: Any, seats: list[Any], group: Any, owns: bool, store: list[Any]) -> None:
    """Give the room back."""
    store.clear()
    with suppress(Exception):  # the cluster may have ended before
        for seat in seats:
            ray.kill(seat)
        ray.util.remove_placement_group(group)
    if owns:
        ray.shutdown()
