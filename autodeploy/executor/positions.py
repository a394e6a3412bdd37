"""How many positions a program knows: tables of positions have an end, and what lies behind it is not computed but fails."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from autodeploy.custom_ops import PROVIDED
from autodeploy.program import Program

aten = torch.ops.aten
SAME = (aten.view.default, aten.reshape.default, aten.unsqueeze.default, aten.squeeze.dim, aten.select.int, aten.to.dtype)
"""What changes the shape or dtype of positions alone."""


def table_of_positions(program: Program) -> tuple[str, int] | None:
    """(parameter, how many positions it has rows for) of the shortest table that is read by position; None where none is."""
    found = list[tuple[str, int]]()
    for node in program.graph.graph.nodes:
        if node.op == "call_function" and _reads_rows(node.target):
            table, index = node.args[:2]
            places = index if isinstance(index, list | tuple) else [index]
            offset = _offset(places[0]) if len(places) == 1 else None
            if offset is not None and isinstance(table, fx.Node) and table.op == "get_attr":
                found.append((str(table.target), program.parameter(str(table.target)).shape[0] - offset))
    return min(found, key=lambda item: item[1], default=None)


def _reads_rows(target: Any) -> bool:
    op = PROVIDED[target][0].overload if target in PROVIDED else target
    return op in (aten.embedding.default, aten.index.Tensor)


def _offset(node: Any) -> int | None:
    """What is added to `position_ids`; None where it is anything else."""
    if not isinstance(node, fx.Node):
        return None
    if node.op == "placeholder":
        return 0 if node.name == "position_ids" else None
    if node.target in SAME:
        return _offset(node.args[0])
    if node.target is aten.add.Tensor and isinstance(node.args[1], int):
        before = _offset(node.args[0])
        return None if before is None else before + node.args[1]
    return None
