"""Random models go through the canonical passes unchanged in what they compute; a failure is made small."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import ClassVar

import pytest
from torch import nn

from autodeploy import Effect, Program, Target, Transform
from autodeploy import custom_ops as ops
from autodeploy.transforms.cleanup import Cleanup
from autodeploy.transforms.fuse_linears import FuseLinears
from autodeploy.transforms.rewrite import aten, calls
from tests.transforms.graph_fuzz import PASSES, failure, minimise, num_nodes, random_model, report
from tests.transforms.helpers import apply, toy_program

SIDE_BY_SIDE = 15
"""Models in one captured graph."""


@pytest.mark.parametrize("first", range(0, 300, 75))
def test_three_hundred_random_models(first: int) -> None:
    check(range(first, first + 75))


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("first", range(1000, 6000, 500))
def test_five_thousand_random_models(first: int) -> None:
    check(range(first, first + 500))


def check(seeds: range) -> None:
    batches = [seeds[i : i + SIDE_BY_SIDE] for i in range(0, len(seeds), SIDE_BY_SIDE)]
    found = [text for batch in batches if (text := report(batch))]
    assert not found, "\n\n".join(found)


@dataclass(frozen=True, kw_only=True)
class WrongActivation(Transform):
    """Takes the activated factor for the other one."""

    name: ClassVar[str] = "wrong_activation"
    effect: ClassVar[Effect] = Effect.FUSION

    def apply(self, program: Program, target: Target) -> int:
        found = [node for node in calls(program, ops.gated_activation) if node.args[0] is not node.args[1]]
        for node in found:
            node.args = (node.args[1], node.args[0], node.args[2])
        return len(found)


def test_a_failing_model_is_reduced_to_ten_nodes_at_most() -> None:
    passes = (*PASSES[:5], WrongActivation())
    model = next(model for seed in range(100) if failure(model := random_model(seed, 10), passes=passes))
    small = minimise(model, lambda smaller: bool(failure(smaller, passes=passes)))
    assert len(small) <= 2 < len(model) and num_nodes(small) <= 10
    assert "differ" in failure(small, passes=passes) and not failure(small)


def test_a_view_across_tokens_of_a_fused_product_copies() -> None:
    def body(toy, x, positions):
        halves = [toy.extra[name](x).view(1, -1, 4).view(1, -1, 8) for name in ("a", "b")]
        return aten.cat.default(halves, -1)

    program, _ = toy_program(body, a=nn.Linear(16, 8), b=nn.Linear(16, 8))
    assert apply(program, Cleanup(), FuseLinears())[1] == 1
    assert program.op_counts()["aten.reshape"] == 2 and calls(program, operator.getitem)
