"""The process groups of a mesh: tensors go over torch.distributed, by gloo between CPUs and by NCCL between GPUs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from autodeploy.custom_ops.collectives import set_group
from autodeploy.custom_ops.stages import ProcessLink, set_link
from autodeploy.errors import ConfigError
from autodeploy.specs import Mesh

ENVIRONMENT = "env://"
"""The rendezvous of ranks that torchrun has started."""
SLACK = 2.0
"""Seconds that a collective waits longer than a step may take, so that whoever watches steps has the first word."""


def refuse_second_group() -> None:
    """Raises ConfigError where this process is a rank already."""
    if dist.is_initialized():
        raise ConfigError(
            "this process already belongs to a process group of torch.distributed, of another engine or of its own. "
            "Shut the other engine down, or call torch.distributed.destroy_process_group(), and start again."
        )


def join(mesh: Mesh, rank: int, device: str, rendezvous: str, timeout: float) -> Any:
    """Meet the other ranks. rendezvous: file:// of a file that all can open, tcp:// of the store of rank 0, or `ENVIRONMENT`.

    The result is the group of rank 0 and the rank that sends it the logits, where those are two.
    """
    backend, index = ("nccl", torch.device(device)) if device.startswith("cuda") else ("gloo", None)
    wait = timedelta(seconds=timeout + SLACK)
    with _on_loopback() if rendezvous.startswith("file://") else _as_it_is():
        dist.init_process_group(
            backend, store=_store(rendezvous, mesh.size), rank=rank, world_size=mesh.size, timeout=wait, device_id=index
        )
        stages = [list(range(stage * mesh.tp, (stage + 1) * mesh.tp)) for stage in range(mesh.pp)]
        groups = [dist.new_group(ranks, timeout=wait) for ranks in stages] if mesh.pp > 1 else [dist.group.WORLD]
        ends = dist.new_group([0, mesh.logits_rank], timeout=wait) if mesh.pp > 1 else None
    set_group(groups[mesh.stage(rank)])
    set_link(ProcessLink(rank - mesh.tp, rank + mesh.tp))
    return ends


def leave() -> None:
    """No harm when there is no group."""
    set_group(None)
    set_link(None)
    if dist.is_initialized():
        dist.destroy_process_group()


def _store(rendezvous: str, size: int) -> Any:
    if rendezvous == ENVIRONMENT:
        return torchrun_store()
    kind, _, place = rendezvous.partition("://")
    if kind == "file":
        return dist.FileStore(place, size)  # pyright: ignore[reportPrivateImportUsage]
    host, _, port = place.rpartition(":")
    return dist.TCPStore(host, int(port), is_master=False)  # pyright: ignore[reportPrivateImportUsage]


def torchrun_store() -> Any:
    """What the ranks that torchrun has started share."""
    return next(dist.rendezvous(ENVIRONMENT))[0]  # pyright: ignore[reportPrivateImportUsage]


@contextmanager
def _on_loopback() -> Iterator[None]:
    """Ranks of one machine are not to be reached from others. gloo takes the interface from the environment."""
    name = "GLOO_SOCKET_IFNAME"
    given = os.environ.get(name)
    os.environ[name] = given or "lo"
    try:
        yield
    finally:
        if given is None:
            del os.environ[name]


@contextmanager
def _as_it_is() -> Iterator[None]:
    yield
