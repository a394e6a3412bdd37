"""match_rope: x * cos + rotated(x) * sin becomes one op."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from autodeploy import custom_ops as ops
from autodeploy.program import Program
from autodeploy.specs import Target
from autodeploy.transforms.base import Effect, Transform
from autodeploy.transforms.rewrite import Bindings, Call, Var, aten, calls, first_match, replace_call, val

x, cos, sin, half = Var("x"), Var("cos"), Var("sin"), Var("half", lambda value: isinstance(value, int))
END = Var("end", lambda value: value == sys.maxsize)
DIM = Var("last", lambda value: value in (3, -1))

HALVES = Call(
    aten.cat.default,
    [Call(aten.neg.default, Call(aten.slice.Tensor, x, DIM, half, END)), Call(aten.slice.Tensor, x, DIM, 0, half)],
    -1,
)
ODD = Call(aten.neg.default, Call(aten.slice.Tensor, x, DIM, 1, END, 2))
EVEN = Call(aten.slice.Tensor, x, DIM, 0, END, 2)
PAIRS = Call(aten.flatten.using_ints, Call(aten.stack.default, [ODD, EVEN], -1), -2)

ROPES = {
    interleaved: Call(aten.add.Tensor, Call(aten.mul.Tensor, x, cos), Call(aten.mul.Tensor, rotated, sin))
    for interleaved, rotated in {False: HALVES, True: PAIRS}.items()
}


@dataclass(frozen=True, kw_only=True)
class MatchRope(Transform):
    """Rotary embedding, by halves or interleaved, of queries and keys.

    before:  r = cat([neg(slice(x, 3, d)), slice(x, 3, 0, d)], -1); y = add(mul(x, cos), mul(r, sin))
    after:   y = rope(x, cos, sin, False)
    """

    name: ClassVar[str] = "match_rope"
    effect: ClassVar[Effect] = Effect.FUSION

    def apply(self, program: Program, target: Target) -> int:
        rewrites = 0
        for node in calls(program, aten.add.Tensor):
            if found := first_match(ROPES, node, _covers):
                interleaved, m = found
                replace_call(program, node, ops.rope, m["x"], m["cos"], m["sin"], interleaved)
                rewrites += 1
        return rewrites


def _covers(node: fx.Node, m: Bindings) -> bool:
    """The halves are halves, and cos and sin widen neither x's dtype nor its shape."""
    value, result = val(m["x"]), val(node)
    halves = "half" not in m or 2 * m["half"] == value.shape[-1]
    return halves and str(result.shape) == str(value.shape) and result.dtype == value.dtype
