"""Factors of columns that make matrices easier to round: a matrix is multiplied by them, what gives its inputs is divided.

SmoothQuant (Xiao et al., 2022) evens out the largest inputs, for activations that are rounded too; AWQ (Lin et al., 2023) keeps
the columns exact that matter most. Where the factors can go is read off the graph: into whatever scales the inputs one by one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from autodeploy import custom_ops as ops
from autodeploy.formats import Format
from autodeploy.transforms.rewrite import CASTS, arguments, aten, val

STEPS = 10
"""Powers between none and all of the inputs' size that AWQ tries."""
STRENGTH = 0.5
"""Share of the inputs' spread that SmoothQuant gives to the weights."""
LEAST = 1e-5
ROW_VIEWS = CASTS | {aten.view.default, aten.reshape.default}


def readers(x: fx.Node) -> list[fx.Node]:
    """The linears and experts that read the columns of x, if nobody else does; through casts and views of its rows."""
    found, todo = [], list[tuple[fx.Node, fx.Node]]((user, x) for user in x.users)
    for user, read in todo:
        if _keeps_columns(user):
            todo += [(further, user) for further in user.users]
        elif user.target in (aten.linear.default, ops.moe.overload) and user.args[0] is read:
            found.append(user)
        else:
            return []
    return found


def weight_of(reader: fx.Node) -> fx.Node:
    """The parameter whose columns are multiplied with those of a linear's or experts' inputs."""
    weight: Any = reader.args[1] if reader.target is aten.linear.default else arguments(reader)["gate_up"]
    return _through_casts(weight)


def same_rows_as(x: fx.Node) -> fx.Node:
    """What x is cast from, or a view of the rows of."""
    while _keeps_columns(x):
        x = x.all_input_nodes[0]
    return x


def _keeps_columns(node: fx.Node) -> bool:
    return node.target in ROW_VIEWS and val(node).shape[-1] == val(node.all_input_nodes[0]).shape[-1]


def divisible(x: fx.Node) -> list[str]:
    """The parameters that divide x by column when their first dim is divided: none where there are no such ones.

    They are those of a layer norm, the weight that multiplies at the end of a norm, or the linear whose outputs are multiplied.
    """
    found = []
    if x.target is aten.layer_norm.default:
        found = list(x.args[2:4])
    elif x.target is aten.mul.Tensor:
        found = next(filter(None, map(_factor, x.args)), [])
    parameters: list[Any] = [parameter for parameter in found if parameter is not None]
    columns = val(x).shape[-1]
    suit = all(each.op == "get_attr" and len(each.users) == 1 and val(each).shape[0] == columns for each in parameters)
    return [str(each.target) for each in parameters] if suit else []


def _factor(node: Any) -> list[Any]:
    """The parameters of one side of a product."""
    if not isinstance(node, fx.Node):
        return []
    if node.op == "get_attr" and val(node).dim() == 1:
        return [node]
    node = _through_casts(node)
    return list(node.args[1:3]) if node.target is aten.linear.default and len(node.users) == 1 else []


def _through_casts(node: fx.Node) -> fx.Node:
    """What was cast for one reader each."""
    while node.target in CASTS and len(node.all_input_nodes[0].users) == 1:
        node = node.all_input_nodes[0]
    return node


def smoothquant(rows: Tensor, weights: Sequence[Tensor], form: Format) -> Tensor:
    """Factors [K] for inputs [rows, K] and the matrices [N, K] that they are multiplied with."""
    inputs, columns = rows.abs().amax(0), torch.cat(list(weights)).abs().amax(0)
    return (inputs.clamp_min(LEAST) ** STRENGTH / columns.clamp_min(LEAST) ** (1 - STRENGTH)).clamp_min(LEAST)


def awq(rows: Tensor, weights: Sequence[Tensor], form: Format) -> Tensor:
    """Factors [K]: the power of the inputs' mean size with which the rounded matrices change the products least."""
    size, products = rows.abs().mean(0).clamp_min(LEAST), rows.T @ rows / len(rows)
    tried = [size ** (step / STEPS) for step in range(STEPS + 1)]
    tried = [factors / (factors.max() * factors.min()).sqrt() for factors in tried]

    def lost(factors: Tensor) -> float:
        errors = [_rounded(weight * factors, form) / factors - weight for weight in weights]
        return sum(float((error @ products * error).sum()) for error in errors)

    return min(tried, key=lost)


def _rounded(weight: Tensor, form: Format) -> Tensor:
    return form.dequantize(tuple(weight.shape), *form.quantize(weight))


FACTORS = {"smoothquant": smoothquant, "awq": awq}
