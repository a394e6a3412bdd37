"""A plugin for autodeploy: the residual addition and the norm behind it as one op."""

import operator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from autodeploy import Effect, Pipeline, Program, Target, Transform, ops
from autodeploy.transforms.rewrite import aten, calls, erase_unused, insert_call, val


@ops.semantic_op(fake=lambda x, residual, *_: (torch.empty_like(x), torch.empty_like(x)))
def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, offset: float, weight_in_float: bool
) -> tuple[Tensor, Tensor]:
    """(total, rms_norm(total)) of total = x + residual, both [..., C]."""
    total = x + residual
    return total, ops.rms_norm.reference(total, weight, eps, offset, weight_in_float)


@dataclass(frozen=True, kw_only=True)
class FuseAddNorm(Transform):
    """An addition and the rms_norm of its sum.

    before:  h = add(x, residual); y = rms_norm(h, weight, eps, 0.0, False)
    after:   h, y = add_rms_norm(x, residual, weight, eps, 0.0, False)
    """

    name: ClassVar[str] = "fuse_add_norm"
    effect: ClassVar[Effect] = Effect.FUSION
    results: ClassVar[tuple[int, int]] = (0, 1)
    min_width: int = 1

    def apply(self, program: Program, target: Target) -> int:
        rewrites = 0
        for norm in calls(program, ops.rms_norm):
            add = norm.args[0]
            if not is_plain_sum(add) or val(add).shape[-1] < self.min_width:
                continue
            both = insert_call(program, add, add_rms_norm, *add.args, *norm.args[1:])
            for old, result in zip((add, norm), self.results, strict=True):
                old.replace_all_uses_with(insert_call(program, add, operator.getitem, both, result))
            erase_unused(norm, add)
            rewrites += 1
        return rewrites


def is_plain_sum(node: Any) -> bool:
    """An addition of two tensors that are alike in shape and dtype, neither scaled."""
    if not isinstance(node, fx.Node) or node.target is not aten.add.Tensor or node.kwargs:
        return False
    a, b = (val(arg) for arg in node.args)
    return isinstance(b, Tensor) and a.dtype == b.dtype and str(a.shape) == str(b.shape)


@dataclass(frozen=True, kw_only=True)
class FuseAddNormWrongly(FuseAddNorm):
    """The same with the two results mixed up, which no check of shapes can see."""

    name: ClassVar[str] = "fuse_add_norm_wrongly"
    results: ClassVar[tuple[int, int]] = (1, 0)


def plugin(pipeline: Pipeline) -> Pipeline:
    return pipeline.insert_after("match_mlp", FuseAddNorm())


def wrong_plugin(pipeline: Pipeline) -> Pipeline:
    return pipeline.insert_after("match_mlp", FuseAddNormWrongly())
