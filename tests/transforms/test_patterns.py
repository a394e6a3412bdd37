"""Patterns: every argument counts, in order, by name or by its default."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autodeploy import Program
from autodeploy.transforms.fuse_linears import FuseLinears
from autodeploy.transforms.match_norm import MatchNorm
from autodeploy.transforms.match_rope import MatchRope
from autodeploy.transforms.rewrite import Call, MaybeCast, Var, aten, calls, first_match, insert_call, match, replace_call
from tests.transforms.helpers import apply, toy_program

A, B = Var("a"), Var("b")


@pytest.fixture(scope="module")
def program() -> Program:
    """A plain sum, a scaled one, a softmax in another dtype, and two linears."""

    def body(toy: Any, x: Tensor, positions: Tensor) -> Tensor:
        plain, scaled = x + x.relu(), torch.add(x.relu(), x, alpha=0.5)
        soft = torch.softmax(plain, -1, dtype=torch.float64).to(x.dtype)
        return toy.extra["biased"](soft) + toy.extra["bare"](scaled.split(8, -1)[1])

    return toy_program(body, biased=nn.Linear(16, 16), bare=nn.Linear(8, 16, bias=False))[0]


def matches(program: Program, pattern: Call) -> list[int]:
    """In how many ways each call of the pattern's targets is the pattern."""
    return [len(list(match(pattern, node))) for node in calls(program, *pattern.targets)]


@pytest.mark.parametrize(
    ("pattern", "ways"),
    [
        (Call(aten.add.Tensor, A, Call(aten.relu.default, B)), [1, 0, 0]),  # the second is scaled by alpha
        (Call(aten.add.Tensor, A, Call(aten.relu.default, B), alpha=0.5), [0, 1, 0]),
        (Call(aten.add.Tensor, A, B, alpha=Var("alpha")), [2, 2, 2]),
        (Call(aten.add.Tensor, A), [0, 0, 0]),  # the other summand has no default
        (Call(aten.add.Tensor, A, B, beta=1), [0, 0, 0]),
        (Call(aten.linear.default, A, B), [0, 1, 1]),
        (Call(aten.linear.default, A, B, bias=Var("bias", lambda bias: bias is not None)), [1, 0, 0]),
        (Call(aten.linear.default, A, B, Var("bias")), [1, 1, 1]),
        (Call(aten.softmax.int, A, -1), [0]),
        (Call(aten.softmax.int, A, -1, torch.float64), [1]),
        (Call(aten.softmax.int, MaybeCast(Call(aten.add.Tensor, A, B)), dim=-1, dtype=torch.float64), [2]),
        (Call(operator.getitem, A, 1), [0, 1]),
    ],
)
def test_a_call_matches_with_all_its_arguments(pattern: Call, ways: list[int], program: Program) -> None:
    assert matches(program, pattern) == ways


def test_first_match_names_the_form(program: Program) -> None:
    forms = {"scaled": Call(aten.add.Tensor, A, B, alpha=0.5), "plain": Call(aten.add.Tensor, A, B)}
    found = [first_match(forms, node, lambda node, m: True) for node in calls(program, aten.add.Tensor)]
    assert [form and form[0] for form in found] == ["plain", "scaled", "plain"]


def test_a_packet_of_overloads_is_refused(program: Program) -> None:
    message = r"aten\.square is a packet of overloads; write aten\.square\.default"
    node = calls(program, aten.relu.default)[0]
    for use in (
        lambda: calls(program, aten.square),
        lambda: Call(aten.square, A),
        lambda: insert_call(program, node, aten.square, node),
    ):
        with pytest.raises(TypeError, match=message):
            use()


def scaled_norm(x: Tensor, weight: Tensor) -> Tensor:
    """Nearly rms_norm: eps is scaled."""
    return weight * (x * torch.rsqrt(torch.add(x.pow(2).mean(-1, keepdim=True), 1e-2, alpha=3)))


def norm_of_a_norm(x: Tensor, weight: Tensor) -> Tensor:
    """Nearly layer_norm: less is subtracted."""
    centred = torch.sub(x, x.mean(-1, keepdim=True), alpha=0.5)
    return weight * (centred * torch.rsqrt(centred.pow(2).mean(-1, keepdim=True) + 1e-2))


@pytest.mark.parametrize(("form", "rewritten"), [(scaled_norm, 0), (norm_of_a_norm, 1)])
def test_a_scaled_part_of_a_norm_is_not_taken_for_a_plain_one(form: Any, rewritten: int) -> None:
    program, _ = toy_program(lambda toy, x, positions: form(x, toy.extra["norm"].weight), norm=nn.LayerNorm(16))
    assert apply(program, MatchNorm()) == [rewritten]
    assert not calls(program, torch.ops.autodeploy.layer_norm.default)


def test_a_scaled_rotation_is_no_rope() -> None:
    def body(toy: Any, x: Tensor, positions: Tensor) -> Tensor:
        heads = x.unflatten(-1, (4, 4)).transpose(1, 2)
        angles = positions[:, None, :, None].float() * torch.ones(4)
        turned = torch.cat([-heads[..., 2:], heads[..., :2]], -1)
        ropes = [torch.add(heads * angles.cos(), turned * angles.sin(), alpha=alpha) for alpha in (1, 0.5)]
        return (ropes[0] + ropes[1]).transpose(1, 2).flatten(-2)

    program, _ = toy_program(body)
    assert apply(program, MatchRope()) == [1]
    assert any(node.kwargs == {"alpha": 0.5} for node in calls(program, aten.add.Tensor))


def test_linears_with_a_bias_given_by_name_are_left_alone() -> None:
    layers = {name: nn.Linear(16, 16) for name in "ab"}
    program, _ = toy_program(lambda toy, x, positions: toy.extra["a"](x) * toy.extra["b"](x), **layers)
    for node in calls(program, aten.linear.default)[:2]:
        *leading, bias = node.args
        node.args, node.kwargs = tuple(leading), {"bias": bias}
    assert apply(program, FuseLinears()) == [0]


def test_a_view_of_a_value_that_lies_otherwise_now_becomes_a_reshape() -> None:
    program, _ = toy_program(lambda toy, x, positions: x.clone().view(1, -1, 2).view(x.shape))
    (clone,) = calls(program, aten.clone.default)
    turned = insert_call(program, clone, aten.transpose.int, clone.args[0], 1, 2)
    copied = insert_call(program, clone, aten.clone.default, turned, memory_format=torch.contiguous_format)
    replace_call(program, clone, aten.transpose.int, copied, 1, 2)
    targets = [node.target for node in calls(program, aten.view.default, aten.reshape.default)]
    assert targets == [aten.reshape.default, aten.view.default]
    program.check()
