"""A plugin: the logits become the mean of those of all ranks, so that every step waits for every rank."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from autodeploy import Effect, Pipeline, Program, Target, Transform
from autodeploy.custom_ops.collectives import all_reduce
from autodeploy.transforms.rewrite import aten, insert_call


@dataclass(frozen=True, kw_only=True)
class AverageLogits(Transform):
    name: ClassVar[str] = "average_logits"
    effect: ClassVar[Effect] = Effect.REWRITE

    def apply(self, program: Program, target: Target) -> int:
        output = program.graph.graph.output_node()
        (logits,) = output.all_input_nodes
        if target.mesh.tp == 1 or logits.target is aten.div.Tensor:
            return 0
        with_sum: Any = insert_call(program, output, all_reduce.overload, logits)
        mean = insert_call(program, output, aten.div.Tensor, with_sum, target.mesh.tp)
        output.replace_input_with(logits, mean)
        return 1


def plugin(pipeline: Pipeline) -> Pipeline:
    return pipeline.insert_before("select_kernels", AverageLogits())
