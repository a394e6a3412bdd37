"""How many operations the products of a program are, when its symbolic sizes are given numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod
from typing import Any

import torch
from torch import fx

from autodeploy.custom_ops import expert_linear, moe
from autodeploy.custom_ops.op import call_arguments

aten = torch.ops.aten


class Sizes:
    """Shapes and bytes of values when symbolic sizes are these numbers."""

    def __init__(self, numbers: Mapping[Any, int]) -> None:
        self.numbers = numbers
        self._known: dict[Any, int] = {}

    def number(self, size: Any) -> int:
        if isinstance(size, int):
            return size
        if (expression := size.node.expr) not in self._known:
            self._known[expression] = int(expression.xreplace(self.numbers))
        return self._known[expression]

    def shape(self, node: Any) -> tuple[int, ...]:
        return tuple(map(self.number, node.meta["val"].shape))

    def num_bytes(self, node: fx.Node) -> int:
        """Of a call's value, or of all of them."""
        values = node.meta.get("val")
        values = values if isinstance(values, list | tuple) else [values]
        tensors = [value for value in values if isinstance(value, torch.Tensor)]
        return sum(prod(map(self.number, tensor.shape)) * tensor.element_size() for tensor in tensors)


# Operations of a product. (call, sizes) -> how many


def _linear(node: fx.Node, sizes: Sizes) -> int:
    return 2 * prod(sizes.shape(node)) * sizes.shape(node.args[0])[-1]


def _addmm(node: fx.Node, sizes: Sizes) -> int:
    return 2 * prod(sizes.shape(node)) * sizes.shape(node.args[1])[-1]


def _einsum(node: fx.Node, sizes: Sizes) -> int:
    """Every letter of the equation is a loop."""
    equation: Any = node.args[0]
    tensors: Any = node.args[1]
    letters = dict[str, int]()
    for names, tensor in zip(equation.split("->")[0].replace(" ", "").split(","), tensors, strict=True):
        letters |= zip(names, sizes.shape(tensor), strict=True)
    return 2 * prod(letters.values())


def _moe(node: fx.Node, sizes: Sizes) -> int:
    given = call_arguments(node.target, node.args, node.kwargs)
    matrices = prod(sizes.shape(given["gate_up"])[1:]) + prod(sizes.shape(given["down"])[1:])
    return 2 * prod(sizes.shape(given["expert_index"])) * matrices


def _expert_linear(node: fx.Node, sizes: Sizes) -> int:
    given = call_arguments(node.target, node.args, node.kwargs)
    return 2 * prod(sizes.shape(given["expert_index"])) * prod(sizes.shape(given["weight"])[1:])


FLOP: dict[Any, Callable[[fx.Node, Sizes], int]] = {
    aten.linear.default: _linear,
    aten.mm.default: _linear,
    aten.bmm.default: _linear,
    aten.matmul.default: _linear,
    aten.addmm.default: _addmm,
    aten.baddbmm.default: _addmm,
    aten.einsum.default: _einsum,
    moe.overload: _moe,
    expert_linear.overload: _expert_linear,
}
