"""match_conv: convolutions along the tokens become recurrent ops, which remember the last inputs of each request."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import fx

from autodeploy import custom_ops as ops
from autodeploy.program import Program
from autodeploy.specs import Target
from autodeploy.transforms.base import Transform
from autodeploy.transforms.rewrite import arguments, aten, calls, erase_unused, insert_call, val


@dataclass(frozen=True, kw_only=True)
class MatchConv(Transform):
    """A depthwise convolution that sees a token and the K - 1 before it; the token before alone (RWKV's time shift).

    before:  c = conv1d(x, weight, bias, [1], [K - 1], [1], C); y = silu(slice(c, 2, 0, T))
    after:   y = transpose(causal_conv1d(transpose(x, 1, 2), squeeze(weight, 1), bias, "silu"), 1, 2)

    before:  y = constant_pad_nd(x, [0, 0, 1, -1])
    after:   y = token_shift(x)
    """

    name: ClassVar[str] = "match_conv"

    def apply(self, program: Program, target: Target) -> int:
        convolutions = calls(program, aten.conv1d.default)
        shifts = calls(program, aten.constant_pad_nd.default, aten.pad.default)
        return sum(_rewrite_conv(program, node) for node in convolutions) + sum(_rewrite_shift(program, node) for node in shifts)


def _rewrite_conv(program: Program, conv: fx.Node) -> int:
    given = arguments(conv)
    cropped = next(iter(conv.users), None)
    if cropped is None or not _is_causal(given, conv, cropped):
        return 0
    silu = next(iter(cropped.users)) if [user.target for user in cropped.users] == [aten.silu.default] else None
    end = silu or cropped
    x, weight = _transposed(program, end, given["input"]), insert_call(program, end, aten.squeeze.dim, given["weight"], 1)
    y = insert_call(program, end, ops.causal_conv1d.whole, x, weight, given["bias"], "silu" if silu else "none")
    end.replace_all_uses_with(insert_call(program, end, aten.transpose.int, y, 1, 2))
    erase_unused(end)
    return 1


def _is_causal(given: dict[str, Any], conv: fx.Node, cropped: fx.Node) -> bool:
    """Each channel [1, C, T] by itself, K - 1 tokens of padding on both sides, and the right ones cut off again."""
    channels, one, taps = val(given["weight"]).shape
    plain = given["stride"] == [1] and given["dilation"] == [1] and one == 1 and given["groups"] == channels
    if not plain or given["padding"] != [taps - 1] or len(conv.users) != 1 or cropped.target is not aten.slice.Tensor:
        return False
    part = arguments(cropped)
    whole = str(val(cropped).shape) == str(val(given["input"]).shape)  # as expressions: deciding it must add no guard
    return part["dim"] in (2, -1) and part["start"] in (0, None) and part["step"] == 1 and whole


def _transposed(program: Program, before: fx.Node, x: fx.Node) -> fx.Node:
    """x with dims 1 and 2 swapped; what it is the transpose of, where it is one."""
    if x.target is aten.transpose.int and {dim % 3 for dim in x.args[1:]} == {1, 2}:  # pyright: ignore
        return x.args[0]  # pyright: ignore
    return insert_call(program, before, aten.transpose.int, x, 1, 2)


def _rewrite_shift(program: Program, node: fx.Node) -> int:
    given = arguments(node)
    x = given["self"]
    if val(x).dim() != 3 or given["pad"] != [0, 0, 1, -1] or given.get("value") or given.get("mode", "constant") != "constant":
        return 0
    node.replace_all_uses_with(insert_call(program, node, ops.token_shift.whole, x))
    erase_unused(node)
    return 1
