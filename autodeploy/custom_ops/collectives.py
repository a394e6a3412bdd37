"""Ops between the ranks that share a layer. Each is complete when it returns; every rank calls the same ones in the same order.

The group they go over is that of the process (`set_group`), so that one graph serves all ranks, and can be saved.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from autodeploy.custom_ops.op import semantic_op

_group: Any = None


def set_group(group: Any) -> None:
    """The process group of the ranks that share this one's layers; None: there are no others."""
    global _group
    _group = group


@semantic_op(fake=lambda x: torch.empty_like(x, memory_format=torch.contiguous_format))
def all_reduce(x: Tensor) -> Tensor:
    """The sum of every rank's x, on every rank."""
    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=_group)
    return total


def _all_gather_fake(x: Tensor, dim: int, num_ranks: int) -> Tensor:
    return torch.cat([x] * num_ranks, dim)


@semantic_op(fake=_all_gather_fake)
def all_gather(x: Tensor, dim: int, num_ranks: int) -> Tensor:
    """Every rank's x one after the other along a dim, in the order of the ranks, on every rank."""
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(num_ranks)]
    dist.all_gather(parts, x.contiguous(), group=_group)
    return torch.cat(parts, dim)


@semantic_op()
def local_index(index: Tensor, first: Tensor, count: int) -> Tensor:
    """Where things that are dealt out lie on this rank, which has `count` of them from `first` [] on; `count` for all others.

    index: any shape, as the whole model counts them -> the same shape, from 0 to count.
    """
    local = index - first
    return torch.where((local >= 0) & (local < count), local, count)


COLLECTIVES = {all_reduce.overload, all_gather.overload}
"""Ops that wait for the other ranks."""
