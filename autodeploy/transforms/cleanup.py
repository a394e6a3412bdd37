"""cleanup: what export leaves behind and no later pass should have to look past."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from autodeploy.program import Program
from autodeploy.specs import Target
from autodeploy.transforms.base import Transform
from autodeploy.transforms.rewrite import aten, val

SAME_IF_UNCHANGED = {
    aten.to.dtype,
    aten._to_copy.default,
    aten.to.device,
    aten.to.dtype_layout,
    aten.to.other,
    aten.type_as.default,
    aten.contiguous.default,
    aten.expand.default,
    aten.reshape.default,
    aten.view.default,
    aten.alias.default,
    aten.detach_.default,
    aten.detach.default,
    aten.lift_fresh_copy.default,
}
"""Ops that are the identity when shape, strides and dtype of their first argument stay."""


@dataclass(frozen=True, kw_only=True)
class Cleanup(Transform):
    """Drop casts, views and slices that do nothing; compute equal expressions once.

    before:  y = aten.to.dtype(x, float32); z = aten.slice(y, 1, 0, 9223372036854775807)
    after:   users of z read x
    """

    name: ClassVar[str] = "cleanup"

    def apply(self, program: Program, target: Target) -> int:
        graph = program.graph.graph
        rewrites = 0
        seen: dict[Any, fx.Node] = {}
        for node in list(graph.nodes):
            if node.op not in ("call_function", "get_attr"):
                continue
            same: Any = node.args[0] if is_identity(node) else seen.setdefault(_key(node), node) if is_pure(node) else node
            if same is not node:
                node.replace_all_uses_with(same)
                graph.erase_node(node)
                rewrites += 1
        return rewrites


def is_identity(node: fx.Node) -> bool:
    if node.target is aten.dropout.default:
        return node.args[2] is False
    if node.target is aten.slice.Tensor:
        start, step = node.args[2] if len(node.args) > 2 else 0, node.args[4] if len(node.args) > 4 else 1
        return bool(start in (0, None) and step == 1) and _same_value(node)
    return node.target in SAME_IF_UNCHANGED and _same_value(node)


def _same_value(node: fx.Node) -> bool:
    before, after = val(node.args[0]), val(node)
    return bool(
        isinstance(before, torch.Tensor)
        and before.dtype == after.dtype
        and before.device == after.device
        and _same_numbers(before.shape, after.shape)
        and _same_numbers(before.stride(), after.stride())
    )


def _same_numbers(a: Any, b: Any) -> bool:
    """Equal as expressions: deciding it must not add a guard on the symbolic dimension."""
    return len(a) == len(b) and all(_expression(x) == _expression(y) for x, y in zip(a, b, strict=True))


def _expression(size: Any) -> Any:
    return size if isinstance(size, int) else size.node.expr


def is_pure(node: fx.Node) -> bool:
    """A call (or parameter) whose value depends on its arguments alone and which writes nothing."""
    if node.op == "get_attr":
        return True
    return (
        isinstance(node.target, torch._ops.OpOverload)
        and not node.is_impure()
        and torch.Tag.nondeterministic_seeded not in node.target.tags
    )


def _key(node: fx.Node) -> Any:
    return repr((str(node.target), node.args, sorted(node.kwargs.items())))
