"""Random models go through the canonical passes unchanged in what they compute; a failure is made small."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from torch import nn

from autodeploy import Effect, Pipeline, Program, Target, Transform
from autodeploy import custom_ops as ops
from autodeploy.transforms.cleanup import Cleanup
from autodeploy.transforms.fuse_linears import FuseLinears
from autodeploy.transforms.rewrite import aten, calls
from tests.transforms.graph_fuzz import (
    KINDS,
    PASSES,
    Step,
    failure,
    minimise,
    num_nodes,
    outcome,
    random_model,
    report,
    side_by_side,
)
from tests.transforms.helpers import apply, toy_program

REWRITING = ("match_norm", "match_rope", "match_mlp", "fuse_linears", "fuse_add_norm")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Threads cost more than they bring on tensors this small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("first", range(0, 300, 75))
def test_three_hundred_random_models(first: int) -> None:
    check(range(first, first + 75))


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("first", range(1000, 6000, 500))
def test_five_thousand_random_models(first: int) -> None:
    check(range(first, first + 500))


def check(seeds: range) -> None:
    """No pass fails, and each has something to do (in 300 models: 37 rewrites or more)."""
    outcomes = [report(batch) for batch in side_by_side(seeds)]
    found = [outcome.failure for outcome in outcomes if outcome.failure]
    assert not found, "\n\n".join(found)
    rewrites = sum((outcome.rewrites for outcome in outcomes), Counter())
    assert min(rewrites[name] for name in REWRITING) >= len(seeds) // 8, rewrites


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
    passes = (*PASSES[: Pipeline(PASSES).index("match_mlp") + 1], WrongActivation())
    model = next(model for seed in range(100) if failure(model := random_model(seed, 10), passes=passes))
    small = minimise(model, lambda smaller: bool(failure(smaller, passes=passes)))
    assert len(small) <= 2 < len(model) and num_nodes(small) <= 10
    reason = failure(small, passes=passes)
    assert "'wrong_activation'" in reason and "differ" in reason and not failure(small)


@pytest.mark.parametrize("split", [False, True])
def test_a_view_across_tokens_of_a_fused_product_copies(split: bool) -> None:
    def body(toy, x, positions):
        halves = [toy.extra[name](x) for name in ("a", "b")]
        halves = [half.split(8, -1)[0] if split else half for half in halves]
        return aten.cat.default([half.view(1, -1, 4).view(1, -1, 8) for half in halves], -1)

    program, _ = toy_program(body, a=nn.Linear(16, 8), b=nn.Linear(16, 8))
    assert apply(program, Cleanup(), FuseLinears())[1] == 1
    assert program.op_counts()["aten.reshape"] == 2 and calls(program, operator.getitem)


def test_the_plainest_step_of_every_kind_is_rewritten() -> None:
    rewrites = outcome(*((plainest(kind),) for kind in ("norm", "residual", "layer_norm", "rope", "gated", "linears"))).rewrites
    assert [rewrites[name] for name in REWRITING] == [3, 1, 1, 1, 1]


def test_rope_over_more_heads_than_its_input_has_is_left_alone() -> None:
    result = outcome((plainest("rope", broadcast="heads"),))
    assert not result.failure and result.rewrites["match_rope"] == 0


def plainest(kind: str, **options: object) -> Step:
    return Step(kind, (0, 0), tuple(({name: option.taken[0] for name, option in KINDS[kind][1].items()} | options).items()))


@pytest.mark.parametrize("kind", ["layer_norm", "gated"])
def test_a_view_of_a_match_with_another_layout_copies(kind: str) -> None:
    """Layer norm makes its result contiguous, a product takes after its first factor: the ops, after their first argument."""
    step = replace(plainest("gated", up_first=True) if kind == "gated" else plainest(kind), inputs=(1, 0))
    views = [replace(plainest("reshaped", form=form), inputs=(at, 0)) for form, at in {"transposed": 0, "regrouped": 2}.items()]
    result = outcome((views[0], step, views[1]))
    assert not result.failure and result.rewrites["match_norm"] + result.rewrites["match_mlp"] == 1
