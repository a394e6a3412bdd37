"""Ops between the ranks of neighbouring stages: a value goes from one to the next. Both sides name them in the same order.

Which ranks these are is known to the process (`set_link`), so that a stage's graph serves all of its ranks, and can be saved.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.fx.node import has_side_effect

from autodeploy.custom_ops.op import semantic_op


class Link(Protocol):
    """The way to the stages before and after this one."""

    def send(self, x: Tensor) -> None:
        """To the stage after this one; x is contiguous, and may be written to afterwards."""
        ...

    def receive(self, into: Tensor) -> None:
        """From the stage before this one, what it has sent next; `into` is contiguous."""
        ...


class ProcessLink:
    """Stages are processes; before, after: ranks of torch.distributed."""

    def __init__(self, before: int, after: int) -> None:
        self.before, self.after = before, after

    def send(self, x: Tensor) -> None:
        dist.send(x, self.after)

    def receive(self, into: Tensor) -> None:
        dist.recv(into, self.before)


_link: Link | None = None


def set_link(link: Link | None) -> None:
    """The way from this process to its neighbours."""
    global _link
    _link = link


def _current() -> Link:
    assert _link is not None, "a stage has no other ones beside it"
    return _link


@semantic_op(fake=lambda x, tokens: x.new_empty(*tokens.shape, 0))
def send(x: Tensor, tokens: Tensor) -> Tensor:
    """Hand x to the next stage; nothing of each token is left, [1, T, 0]. tokens [1, T]."""
    _current().send(x.contiguous())
    return x.new_empty(*tokens.shape, 0)


def _receive_fake(tokens: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    return tokens.new_empty([tokens.shape[1] if size == -1 else size for size in shape], dtype=dtype)


@semantic_op(fake=_receive_fake)
def receive(tokens: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """What the stage before has sent. tokens [1, T]; a size of -1 is T."""
    into = _receive_fake(tokens, shape, dtype)
    _current().receive(into)
    return into


for _op in (send, receive):  # what one side does, the other one waits for
    has_side_effect(_op.overload)
    has_side_effect(_op.reference)
