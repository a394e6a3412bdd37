"""Causal depthwise convolutions and the shift by one token become ops that remember; others are left to be refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from autodeploy import UnsupportedModelError
from autodeploy import custom_ops as ops
from autodeploy.errors import TransformError
from autodeploy.transforms.cleanup import Cleanup
from autodeploy.transforms.match_conv import MatchConv
from autodeploy.transforms.prove_packing import ProvePacking
from autodeploy.transforms.rewrite import calls
from tests.transforms.helpers import WIDTH, apply, toy_program


def depthwise(taps: int = 4, **options: Any) -> nn.Conv1d:
    return nn.Conv1d(WIDTH, WIDTH, taps, **{"groups": WIDTH, "padding": taps - 1, **options})


def cropped(toy: Any, x: torch.Tensor, act: Any = lambda y: y) -> torch.Tensor:
    return act(toy.extra["conv"](x.transpose(1, 2))[..., : x.shape[1]]).transpose(1, 2)


@pytest.mark.parametrize("activation", ["none", "silu"])
@pytest.mark.parametrize("bias", [True, False])
def test_a_cropped_convolution_is_one_op(activation: str, bias: bool) -> None:
    act = {"none": lambda y: y, "silu": F.silu}[activation]
    program, _ = toy_program(lambda toy, x, p: cropped(toy, x, act), conv=depthwise(bias=bias))
    assert apply(program, Cleanup(), MatchConv(), ProvePacking(), MatchConv())[1:] == [1, 0, 0]
    (node,) = calls(program, ops.causal_conv1d.whole)
    assert node.args[3] == activation and (node.args[2] is not None) == bias
    assert not any("conv1d.default" in op and "causal" not in op for op in program.op_counts())


def test_an_activation_that_is_not_alone_stays() -> None:
    def body(toy: Any, x: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
        return cropped(toy, x, lambda y: F.silu(y) + y)

    program, _ = toy_program(body, conv=depthwise())
    assert apply(program, Cleanup(), MatchConv())[1] == 1
    assert calls(program, ops.causal_conv1d.whole)[0].args[3] == "none" and calls(program, torch.ops.aten.silu.default)


def test_zeros_before_the_row_and_its_end_cut_off_is_a_shift() -> None:
    program, _ = toy_program(lambda toy, x, p: x + toy.extra["shift"](x), shift=nn.ZeroPad2d((0, 0, 1, -1)))
    assert apply(program, Cleanup(), MatchConv(), ProvePacking(), MatchConv())[1:] == [1, 0, 0]
    assert calls(program, ops.token_shift.whole)


OTHERS = {
    "mixes channels": (depthwise(groups=1), cropped),
    "groups": (depthwise(groups=4), cropped),
    "dilated": (depthwise(dilation=2, padding=3), lambda toy, x: toy.extra["conv"](x.transpose(1, 2)).transpose(1, 2)),
    "sees the next token": (depthwise(3, padding=1), lambda toy, x: toy.extra["conv"](x.transpose(1, 2)).transpose(1, 2)),
    "cropped on the left": (depthwise(), lambda toy, x: toy.extra["conv"](x.transpose(1, 2))[..., 3:].transpose(1, 2)),
    "shifted the other way": (nn.ZeroPad2d((0, 0, -1, 1)), lambda toy, x: toy.extra["conv"](x)),
    "shifted by two": (nn.ZeroPad2d((0, 0, 2, -2)), lambda toy, x: toy.extra["conv"](x)),
    "shifted along channels": (nn.ZeroPad2d((1, -1, 1, -1)), lambda toy, x: toy.extra["conv"](x)),
    "filled with ones": (nn.ConstantPad2d((0, 0, 1, -1), 1.0), lambda toy, x: toy.extra["conv"](x)),
}


@pytest.mark.parametrize("name", OTHERS)
def test_anything_else_is_left_and_refused(name: str) -> None:
    module, body = OTHERS[name]
    program, _ = toy_program(lambda toy, x, p: body(toy, x), conv=module)
    assert apply(program, Cleanup(), MatchConv())[1] == 0
    with pytest.raises((UnsupportedModelError, TransformError), match="requests packed in one row would mix"):
        apply(program, ProvePacking())
