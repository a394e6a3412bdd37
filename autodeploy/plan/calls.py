"""What the calls of a lowered program are."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from autodeploy.custom_ops import PROVIDED, SEMANTIC_OPS


def op_of(node: fx.Node) -> Any:
    """What a call means: its op, whichever provider was chosen."""
    return PROVIDED[node.target][0].overload if node.target in PROVIDED else node.target


def op_name(node: fx.Node) -> str:
    """Of a call; of a semantic op without its library."""
    op = SEMANTIC_OPS.get(op_of(node))
    return op.name if op is not None else str(node.target)


def is_view(node: fx.Node) -> bool:
    """Whether a call gives its first argument's numbers without a copy (what may be a view is one, if the dtype is the same)."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return getattr(node.target, "__name__", "") == "getitem"
    source, returned = node.args[0] if node.args else None, node.target._schema.returns[:1]
    if not isinstance(source, fx.Node) or not returned or returned[0].alias_info is None:
        return False
    values = node.meta.get("val"), source.meta.get("val")
    return not all(isinstance(value, torch.Tensor) for value in values) or dtype_of(node) == dtype_of(source)


def provider_name(node: fx.Node) -> str:
    return PROVIDED[node.target][1].name if node.target in PROVIDED else ""


def mutates(node: fx.Node) -> bool:
    op = SEMANTIC_OPS.get(op_of(node))
    return op is not None and bool(op.mutates)


def dtype_of(node: fx.Node) -> str:
    value: Any = node.meta["val"]
    return str((value[0] if isinstance(value, list | tuple) else value).dtype).removeprefix("torch.")
