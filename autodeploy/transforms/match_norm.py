"""match_norm: the norms that models write out by hand become one op each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import fx

from autodeploy import custom_ops as ops
from autodeploy.program import Program
from autodeploy.specs import Target
from autodeploy.transforms.base import Effect, Transform
from autodeploy.transforms.rewrite import (
    CASTS,
    Bindings,
    Call,
    MaybeCast,
    Var,
    arguments,
    aten,
    calls,
    first_match,
    replace_call,
    val,
)

ADD, MUL, SUB = aten.add.Tensor, aten.mul.Tensor, aten.sub.Tensor
x, eps, weight = Var("x"), Var("eps", lambda value: isinstance(value, float)), Var("weight")


def _mean_square(of: Any) -> Call:
    return Call(ADD, Call(aten.mean.dim, Call(aten.pow.Tensor_Scalar, of, 2), [-1], True), eps)


def _inverse_root(of: Any) -> tuple[Call, ...]:
    return Call(aten.rsqrt.default, of), Call(aten.pow.Tensor_Scalar, of, -0.5)


WIDE = MaybeCast(x)
NORMED = tuple(Call(MUL, WIDE, root) for root in _inverse_root(_mean_square(WIDE)))
CENTERED = Call(SUB, WIDE, Call(aten.mean.dim, WIDE, [-1], True))

RMS_NORMS: dict[tuple[float, bool, int], Any] = {
    (offset, in_float, form): pattern
    for form, normed in enumerate(NORMED)
    for (offset, in_float), pattern in {
        (1.0, True): MaybeCast(Call(MUL, normed, Call(ADD, MaybeCast(weight), 1.0))),
        (0.0, False): Call(MUL, weight, MaybeCast(normed)),
        (0.0, True): MaybeCast(Call(MUL, MaybeCast(weight), normed)),
    }.items()
}
"""(offset added to the weight, weight applied before the last cast, form of the root) -> pattern."""

BARE_RMS_NORMS = {form: MaybeCast(normed) for form, normed in enumerate(NORMED)}

LAYER_NORM = MaybeCast(Call(MUL, MaybeCast(weight), Call(MUL, CENTERED, Call(aten.rsqrt.default, _mean_square(CENTERED)))))


@dataclass(frozen=True, kw_only=True)
class MatchNorm(Transform):
    """RMS norms (Llama's, Gemma's 1 + weight, without weight) and layer norms (aten's and hand-written ones).

    before:  h = to(x, float32); r = rsqrt(mean(pow(h, 2), [-1], True) + eps); y = mul(weight, to(mul(h, r), bfloat16))
    after:   y = rms_norm(x, weight, eps, 0.0, False)
    """

    name: ClassVar[str] = "match_norm"
    effect: ClassVar[Effect] = Effect.FUSION

    def apply(self, program: Program, target: Target) -> int:
        return (
            sum(_rewrite_layer_norm(program, node) for node in _results(program))  # first: a centred rms_norm is part of it
            + sum(_rewrite_weighted(program, node) for node in _results(program))
            + sum(_rewrite_bare(program, node) for node in _results(program))
            + sum(_take_over(program, node) for node in calls(program, aten.layer_norm.default))
        )


def _results(program: Program) -> list[fx.Node]:
    """Where a norm may end, last first, so that a cast belongs to the norm it closes."""
    return calls(program, MUL, *CASTS)[::-1]


def _keeps_dtype(node: fx.Node, m: Bindings) -> bool:
    return val(node).dtype == val(m["x"]).dtype


def _has_weight_vector(node: fx.Node, m: Bindings) -> bool:
    """The weight is a parameter over the last dim alone; the other factor could be any tensor (a gate, a scale per layer)."""
    weight = m["weight"]
    is_parameter = isinstance(weight, fx.Node) and weight.op == "get_attr"
    return is_parameter and val(weight).shape == val(m["x"]).shape[-1:] and _keeps_dtype(node, m)


def _rewrite_weighted(program: Program, node: fx.Node) -> int:
    if not node.users or not (found := first_match(RMS_NORMS, node, _has_weight_vector)):
        return 0
    (offset, in_float, _), m = found
    replace_call(program, node, ops.rms_norm, m["x"], m["weight"], m["eps"], offset, in_float)
    return 1


def _rewrite_bare(program: Program, node: fx.Node) -> int:
    if not node.users or not (found := first_match(BARE_RMS_NORMS, node, _keeps_dtype)):
        return 0
    m = found[1]
    replace_call(program, node, ops.rms_norm, m["x"], None, m["eps"], 0.0, False)
    return 1


def _rewrite_layer_norm(program: Program, node: fx.Node) -> int:
    if not node.users or not (found := first_match({0: LAYER_NORM}, node, _keeps_dtype)):
        return 0
    m = found[1]
    replace_call(program, node, ops.layer_norm, m["x"], m["weight"], None, m["eps"])
    return 1


def _take_over(program: Program, node: fx.Node) -> int:
    given = arguments(node)
    if len(given["normalized_shape"]) != 1:
        return 0
    replace_call(program, node, ops.layer_norm, given["input"], given["weight"], given["bias"], given["eps"])
    return 1
