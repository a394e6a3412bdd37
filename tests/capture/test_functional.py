"""Writes in an exported graph become values; where that is not plainly right nothing is touched."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from autodeploy.capture.functional import functionalize


class Body(nn.Module):
    def __init__(self, function: Callable[[Body, Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function
        self.register_buffer("table", torch.ones(4, 6))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def divided(body: Body, x: Tensor) -> Tensor:
    weights, index = x.softmax(-1).topk(2, -1)
    weights /= weights.sum(-1, keepdim=True)
    weights += 1
    return weights * index


def assigned(body: Body, x: Tensor) -> Tensor:
    whole = x.new_zeros(4, 6)
    whole[:, :2] = x[:, 4:]
    whole[:, 2:] = x[:, :4] * 2
    return whole + whole.clone().masked_fill_(x > 0, 3.0)


def chained(body: Body, x: Tensor) -> Tensor:
    y = (x * 2).view(2, 12).add_(1)
    y.mul_(y)
    return y.view(4, 6)


def row(body: Body, x: Tensor) -> Tensor:
    y = x * 1.0
    y[1] = x[0]
    return y


RIGHT = {"divided": divided, "assigned": assigned, "chained": chained, "row": row}


def old_name(body: Body, x: Tensor) -> Tensor:
    y = x * 2
    view = y.view(2, 12)
    y.add_(1)
    return view


def buffer(body: Body, x: Tensor) -> Tensor:
    body.table.copy_(x)  # pyright: ignore[reportCallIssue]
    return body.table * 2  # pyright: ignore[reportOperatorIssue]


def row_of_rows(body: Body, x: Tensor) -> Tensor:
    y = x * 1.0
    y[1] = 2.0
    y.view(24)[3:5].add_(1)
    return y


WRONG = {"an older view is read later": old_name, "a buffer is written": buffer, "a part is written in place": row_of_rows}


def exported(function: Callable[[Body, Tensor], Tensor]) -> torch.fx.GraphModule:
    with torch.no_grad():
        program = torch.export.export(Body(function), (torch.randn(4, 6),), strict=False)
    return program.module(check_guards=False)  # pyright: ignore


@pytest.mark.parametrize("name", RIGHT)
def test_writes_become_values(name: str) -> None:
    module, x = exported(RIGHT[name]), torch.randn(4, 6)
    assert any(
        node.target._schema.is_mutable
        for node in module.graph.nodes
        if node.op == "call_function" and hasattr(node.target, "_schema")
    )
    assert functionalize(module.graph)
    written = [node for node in module.graph.nodes if getattr(getattr(node.target, "_schema", None), "is_mutable", False)]
    assert not written
    module.graph.lint()
    module.recompile()
    assert torch.equal(module(x), RIGHT[name](Body(RIGHT[name]), x))
    assert all(node.meta["val"].shape for node in module.graph.nodes if "scatter" in str(node.target))


@pytest.mark.parametrize("name", WRONG)
def test_what_is_not_plainly_right_is_left_alone(name: str) -> None:
    module = exported(WRONG[name])
    before = str(module.graph)
    assert not functionalize(module.graph) and str(module.graph) == before
