"""match_norm: the norms that models write out by hand become one op each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import fx

from autodeploy import custom_ops as ops
from autodeploy.program import Program
from autodeploy.specs import Target
from autodeploy.transforms.base import Effect, Transform
from autodeploy.transforms.rewrite import Call, MaybeCast, Var, aten, calls, first_match, replace_call, val

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

LAYER_NORM = MaybeCast(
    Call(MUL, MaybeCast(weight), Call(MUL, CENTERED, Call(aten.rsqrt.default, _mean_square(CENTERED))))
)


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
            _match_weighted(program)
            + _match_layer_norm(program)
            + _match_bare(program)
            + sum(_take_over(program, node) for node in calls(program, aten.layer_norm.default))
        )


def _results(program: Program) -> list[fx.Node]:
    """Where a norm may end, last first, so that a cast belongs to the norm it closes."""
    return calls(program, MUL, aten.to.dtype, aten.type_as.default)[::-1]


def _rounds_to(node: fx.Node, value: fx.Node) -> bool:
    return val(node).dtype == val(value).dtype


def _match_weighted(program: Program) -> int:
    rewrites = 0
    for node in _results(program):
        if node.users and (found := first_match(RMS_NORMS, node)):
            (offset, in_float, _), m = found
            if _is_vector(m["weight"], m["x"]) and _rounds_to(node, m["x"]):
                replace_call(program, node, ops.rms_norm, m["x"], m["weight"], m["eps"], offset, in_float)
                program.graph.graph.eliminate_dead_code()
                rewrites += 1
    return rewrites


def _match_bare(program: Program) -> int:
    rewrites = 0
    for node in _results(program):
        if node.users and (found := first_match(BARE_RMS_NORMS, node)) and _rounds_to(node, found[1]["x"]):
            replace_call(program, node, ops.rms_norm, found[1]["x"], None, found[1]["eps"], 0.0, False)
            program.graph.graph.eliminate_dead_code()
            rewrites += 1
    return rewrites


def _match_layer_norm(program: Program) -> int:
    rewrites = 0
    for node in _results(program):
        if node.users and (found := first_match({0: LAYER_NORM}, node)) and _rounds_to(node, found[1]["x"]):
            replace_call(program, node, ops.layer_norm, found[1]["x"], found[1]["weight"], None, found[1]["eps"])
            program.graph.graph.eliminate_dead_code()
            rewrites += 1
    return rewrites


def _take_over(program: Program, node: fx.Node) -> int:
    normalized_shape = node.args[1]
    if len(normalized_shape) != 1:  # pyright: ignore
        return 0
    padded = [*node.args, *(None, None, 1e-5)[len(node.args) - 2 :]]
    replace_call(program, node, ops.layer_norm, padded[0], padded[2], padded[3], padded[4])
    return 1


def _is_vector(weight: Any, value: fx.Node) -> bool:
    """A weight over the last dim alone: the other factor could be any tensor (a gate, a scale per layer)."""
    return isinstance(weight, fx.Node) and val(weight).shape == val(value).shape[-1:] and weight.op == "get_attr"
