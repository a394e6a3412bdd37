"""Ops between the ranks that share a layer. Each is complete when it returns; every rank calls the same ones in the same order.

The group they go over is that of the process (`set_group`), so that one graph serves all ranks, and can be saved.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from autodeploy.custom_ops.op import semantic_op
from autodeploy.custom_ops.pointwise import weighted


class Group(Protocol):
    """The ranks that share this one's layers."""

    def add_up(self, total: Tensor) -> None:
        """Put the sum over all ranks into `total`."""
        ...

    def gather(self, x: Tensor) -> list[Tensor]:
        """Every rank's x, in the order of the ranks."""
        ...


class ProcessGroup:
    """Ranks that are processes; group: of torch.distributed, None for all of them."""

    def __init__(self, group: Any = None) -> None:
        self.group = group

    def add_up(self, total: Tensor) -> None:
        dist.all_reduce(total, group=self.group)

    def gather(self, x: Tensor) -> list[Tensor]:
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size(self.group))]
        dist.all_gather(parts, x, group=self.group)
        return parts


_group: Group = ProcessGroup()
_of_thread = threading.local()


def set_group(group: Any) -> None:
    """The group of torch.distributed whose ranks share this one's layers."""
    global _group
    _group = ProcessGroup(group)


@contextmanager
def thread_group(group: Group) -> Iterator[None]:
    """Collectives that this thread calls go over another group: that of ranks which are threads."""
    _of_thread.group = group
    try:
        yield
    finally:
        del _of_thread.group


def _current() -> Group:
    return getattr(_of_thread, "group", _group)


@semantic_op(fake=lambda x: torch.empty_like(x, memory_format=torch.contiguous_format))
def all_reduce(x: Tensor) -> Tensor:
    """The sum of every rank's x, on every rank."""
    total = x.clone(memory_format=torch.contiguous_format)
    _current().add_up(total)
    return total


def _all_gather_fake(x: Tensor, dim: int, size: int) -> Tensor:
    shape = list(x.shape)
    shape[dim] = size
    return x.new_empty(shape)


@semantic_op(fake=_all_gather_fake)
def all_gather(x: Tensor, dim: int, size: int) -> Tensor:
    """Every rank's x one after the other along a dim, the first `size` elements of that, on every rank."""
    return torch.cat(_current().gather(x.contiguous()), dim).narrow(dim, 0, size)


@semantic_op()
def local_index(index: Tensor, first: Tensor, count: int) -> Tensor:
    """Where things that are dealt out lie on this rank, which has `count` of them from `first` [] on; `count` for all others.

    index: any shape, as the whole model counts them -> the same shape, from 0 to count.
    """
    local = index - first
    return torch.where((local >= 0) & (local < count), local, count)


@semantic_op(fake=lambda weight, indices, first: weight.new_empty(*indices.shape, weight.shape[1]))
def sharded_embedding(weight: Tensor, indices: Tensor, first: Tensor) -> Tensor:
    """This rank's term of a table's rows: those that it has (from row `first` [] of the table on), zeros for the others.

    weight [rows here, K], indices [...] -> [..., K].
    """
    local = local_index.reference(indices, first, weight.shape[0])
    is_here = local < weight.shape[0]
    return F.embedding(torch.where(is_here, local, 0), weight).masked_fill(~is_here[..., None], 0)


@semantic_op(fake=lambda x, *_: torch.empty_like(x))
def sharded_rms_norm(x: Tensor, weight: Tensor | None, eps: float, offset: float, weight_in_float: bool, width: int) -> Tensor:
    """`rms_norm` over a last dim of `width` of which this rank has a part; x [..., part], weight [part] or None."""
    wide = x.float() if x.dtype != torch.float64 else x
    mean = all_reduce(wide.pow(2).sum(-1, keepdim=True)) / width
    return weighted(wide * torch.rsqrt(mean + eps), x.dtype, weight, offset, weight_in_float)


COLLECTIVES = {all_reduce.overload, all_gather.overload, sharded_rms_norm.overload}
"""Ops that wait for the other ranks."""
