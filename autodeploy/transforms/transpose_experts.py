"""transpose_experts: experts of few bits are read the way round in which they are stored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import fx

from autodeploy import custom_ops as ops
from autodeploy.program import Program
from autodeploy.recipes import turned
from autodeploy.specs import Target
from autodeploy.transforms.base import Effect, Transform
from autodeploy.transforms.rewrite import arguments, calls, set_arguments, set_parameter

MATRICES = ("gate_up", "down")


@dataclass(frozen=True, kw_only=True)
class TransposeExperts(Transform):
    """Matrices of experts that have a format, which the model holds with inputs before outputs (gpt-oss), are turned.

    A format is one of rows, so that only then can kernels have them in it.

    before:  moe(x, index, weights, gate_up, down, None, None, True, ...)      gate_up = quantize(...).permute(0, 2, 1)
    after:   moe(x, index, weights, gate_up, down, None, None, False, ...)     gate_up = quantize(...)
    """

    name: ClassVar[str] = "transpose_experts"
    effect: ClassVar[Effect] = Effect.PARAMETERS

    def apply(self, program: Program, target: Target) -> int:
        found = [node for node in calls(program, ops.moe) if arguments(node)["transposed"]]
        nodes = [node for node in found if all(_can_turn(program, arguments(node)[name]) for name in MATRICES)]
        for node in nodes:
            for name in MATRICES:
                _turn(program, str(arguments(node)[name].target))
            set_arguments(node, {"transposed": False})
        return len(nodes)


def _can_turn(program: Program, matrices: Any) -> bool:
    """Whether it is a parameter of this call alone, in one format if it is turned."""
    if not isinstance(matrices, fx.Node) or matrices.op != "get_attr":
        return False
    name = str(matrices.target)
    readers = [user for node in program.graph.graph.find_nodes(op="get_attr", target=name) for user in node.users]
    return len(readers) == 1 and program.weights.format_of(name, is_turned=True) is not None


def _turn(program: Program, name: str) -> None:
    value = program.parameter(name)
    program.weights = program.weights.with_recipes({name: turned(program.weights[name])})
    set_parameter(program, name, value.new_empty(value.transpose(1, 2).shape))
