"""fuse_add_norm: a residual addition and the norm behind it become one op."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import fx

from autodeploy import custom_ops as ops
from autodeploy.program import Program
from autodeploy.specs import Target
from autodeploy.transforms.base import Effect, Transform
from autodeploy.transforms.rewrite import aten, calls, erase_unused, insert_call, val


@dataclass(frozen=True, kw_only=True)
class FuseAddNorm(Transform):
    """A residual addition and an rms_norm of its sum, which the next addition reads too; the last one does not.

    before:  h = add(x, residual); y = rms_norm(h, weight, eps, 0.0, False)
    after:   h, y = add_rms_norm(x, residual, weight, eps, 0.0, False)
    """

    name: ClassVar[str] = "fuse_add_norm"
    effect: ClassVar[Effect] = Effect.FUSION

    def apply(self, program: Program, target: Target) -> int:
        rewrites = 0
        for norm in calls(program, ops.rms_norm):
            if _is_residual_sum(norm.args[0]) and _is_parameter(norm.args[1]):
                _fuse(program, norm.args[0], norm)
                rewrites += 1
        return rewrites


def _is_residual_sum(node: Any) -> bool:
    """An addition of two tensors alike in shape, dtype and layout, neither scaled."""
    if not isinstance(node, fx.Node) or node.target is not aten.add.Tensor or node.kwargs:
        return False
    return all(isinstance(arg, fx.Node) and _kind(arg) == _kind(node) for arg in node.args)


def _kind(node: fx.Node) -> tuple[Any, str, str]:
    return val(node).dtype, str(val(node).shape), str(val(node).stride())


def _is_parameter(weight: Any) -> bool:
    return weight is None or weight.op == "get_attr"


def _fuse(program: Program, add: Any, norm: fx.Node) -> None:
    """Both results where the sum was; the weight moves in front of it when it came later."""
    weight: Any = norm.args[1]
    if weight is not None and weight > add:
        add.prepend(weight)
    both = insert_call(program, add, ops.add_rms_norm, *add.args, *norm.args[1:])
    for i, old in enumerate((add, norm)):
        if old.users.keys() - {norm}:
            old.replace_all_uses_with(insert_call(program, add, operator.getitem, both, i))
    erase_unused(norm, add)
