"""A plugin for autodeploy: a gated activation and the linear behind it as one op."""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, fx
from torch.nn.functional import linear

from autodeploy import Effect, Pipeline, Program, Target, Transform, ops
from autodeploy.transforms.rewrite import aten, calls, replace_call, val


@ops.semantic_op(fake=lambda gate, up, activation, weight: gate.new_empty((*gate.shape[:-1], weight.shape[0])))
def gated_linear(gate: Tensor, up: Tensor, activation: str, weight: Tensor) -> Tensor:
    """(activation(gate) * up) @ weight.T; gate and up [..., I], weight [C, I]."""
    return linear(ops.gated_activation.reference(gate, up, activation), weight)


@dataclass(frozen=True, kw_only=True)
class FuseGatedLinear(Transform):
    """A gated activation and the linear that alone reads it.

    before:  h = gated_activation(gate, up, silu); y = linear(h, weight)
    after:   y = gated_linear(gate, up, silu, weight)
    """

    name: ClassVar[str] = "fuse_gated_linear"
    effect: ClassVar[Effect] = Effect.FUSION
    order: ClassVar[tuple[int, int]] = (0, 1)
    min_width: int = 1

    def apply(self, program: Program, target: Target) -> int:
        rewrites = 0
        for node in calls(program, aten.linear.default):
            if is_lone_product(node.args[0]) and len(node.args) == 2 and val(node).shape[-1] >= self.min_width:
                *factors, activation = node.args[0].args
                first, second = (factors[i] for i in self.order)
                replace_call(program, node, gated_linear, first, second, activation, node.args[1])
                rewrites += 1
        return rewrites


def is_lone_product(node: Any) -> bool:
    """A gated activation that one call alone reads."""
    return isinstance(node, fx.Node) and node.target is ops.gated_activation.overload and len(node.users) == 1


@dataclass(frozen=True, kw_only=True)
class FuseGatedLinearWrongly(FuseGatedLinear):
    """The same with gate and up mixed up, which no check of shapes can see."""

    name: ClassVar[str] = "fuse_gated_linear_wrongly"
    order: ClassVar[tuple[int, int]] = (1, 0)


def plugin(pipeline: Pipeline) -> Pipeline:
    return pipeline.insert_after("match_mlp", FuseGatedLinear())


def wrong_plugin(pipeline: Pipeline) -> Pipeline:
    return pipeline.insert_after("match_mlp", FuseGatedLinearWrongly())
