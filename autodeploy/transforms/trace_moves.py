"""Where each number of a tensor comes from: calls that only move numbers, run on the numbers' addresses."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from autodeploy.transforms.rewrite import aten, named_op, val

MOVE_NAMES = """
    view reshape _unsafe_view flatten.using_ints unflatten.int permute transpose.int movedim.int t numpy_T
    unsqueeze squeeze squeeze.dim squeeze.dims expand expand_as repeat repeat_interleave.self_int
    slice.Tensor select.int narrow split.Tensor split_with_sizes chunk unbind.int
    cat stack copy slice_scatter select_scatter contiguous clone alias detach"""
"""aten calls whose result holds numbers of their tensors, unchanged."""


MOVES = {named_op(name) for name in MOVE_NAMES.split()}
BLANKS = {aten.new_empty.default, aten.empty.memory_format, aten.empty_like.default}


def _moves(node: Any) -> bool:
    """A call that only moves numbers, and changes no dtype on the way."""
    if node.target is operator.getitem:
        return _moves(node.args[0])
    dtypes = {value.dtype for value in map(val, node.all_input_nodes) if isinstance(value, Tensor)}
    return node.target in MOVES and len(dtypes) == 1


@dataclass
class Trace:
    """Calls run on addresses, for a certain number of tokens."""

    symbol: Any
    num_tokens: int
    seen: dict[fx.Node, Any] = field(default_factory=dict)
    """Node -> its addresses: int64 of its shape, each the number of a source's element; -1 is undefined."""
    sources: list[tuple[int, fx.Node]] = field(default_factory=list)
    """First address and node of each tensor that is computed, not moved."""
    size: int = 0

    def run(self, node: fx.Node) -> Any:
        if node not in self.seen:
            self.seen[node] = self._run(node)
        return self.seen[node]

    def _run(self, node: fx.Node) -> Any:
        value = val(node)
        if not isinstance(value, Tensor | list | tuple):
            return self._number(value)
        if _moves(node):
            args, kwargs = fx.map_arg((node.args, node.kwargs), self.run)  # pyright: ignore
            return node.target(*args, **kwargs)  # pyright: ignore
        assert isinstance(value, Tensor)
        known = node.op == "call_function" and node.target not in BLANKS
        return self._addresses(node) if known else torch.tensor(-1).expand(self._shape(value))

    def _addresses(self, node: fx.Node) -> Tensor:
        """New ones, since the node computes its numbers."""
        start, shape = self.size, self._shape(val(node))
        self.size += shape.numel()
        self.sources.append((start, node))
        return torch.arange(start, self.size).reshape(shape)

    def _shape(self, value: Tensor) -> torch.Size:
        return torch.Size([self._number(size) for size in value.shape])

    def _number(self, size: Any) -> Any:
        return int(size.node.expr.subs(self.symbol, self.num_tokens)) if isinstance(size, torch.SymInt) else size

    def source(self, addresses: Tensor) -> tuple[fx.Node, Tensor] | None:
        """The one node [1, ..., T, C] that all the numbers [1, H, T, D] come from, and their columns [H, D] there."""
        low, high = int(addresses.min()), int(addresses.max())
        for start, node in self.sources:
            if start <= low and high < start + self.seen[node].numel():
                rows, width = self.num_tokens, self.seen[node].shape[-1]
                token, column = (addresses[0] - start) // width, (addresses[0] - start) % width
                one_row = self.seen[node].numel() == rows * width
                in_place = torch.equal(token, torch.arange(rows)[None, :, None].expand_as(token))
                same = torch.equal(column, column[:, :1].expand_as(column))
                return (node, column[:, 0]) if one_row and in_place and same else None
        return None

    def nodes_of(self, addresses: Tensor) -> Iterator[fx.Node]:
        """Nodes that hold exactly these numbers [1, 1, T, D], in this order."""
        for node, held in self.seen.items():
            if isinstance(held, Tensor) and torch.equal(held.flatten(), addresses.flatten()):
                yield node
