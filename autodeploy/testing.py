"""check_transform: the one call that tests a graph pass on a model."""

from __future__ import annotations

from typing import Any

from torch import nn

from autodeploy.capture.export import capture
from autodeploy.capture.skeleton import skeleton_of
from autodeploy.program import Program, op_name
from autodeploy.specs import Target
from autodeploy.transforms.base import Transform
from autodeploy.transforms.default import default_pipeline
from autodeploy.transforms.pipeline import Pipeline
from autodeploy.transforms.rewrite import calls


def check_transform(
    model: nn.Module, item: Transform, *, rewrites: int, contains: Any = None, after: str = "match_mlp"
) -> Program:
    """Run the pass on the model's program and check all that is asked of a pass; returns the program after it.

    The model, a small one of transformers, is exported; the default passes up to `after` run, then `item`; after each of them
    the program's structure and its numbers in float64 are compared with those before. `item` must make that many `rewrites`, a
    call of `contains` (a semantic op or a torch overload) must be in the graph then, and `item` once more must change nothing.
    Raises AssertionError; TransformError when a pass fails or changes the numbers; ConfigError when `after` is no pass.
    """
    default = default_pipeline()
    passes = default.passes[: default.index(after) + 1]
    program = capture(skeleton_of(model), dict(model.named_buffers())).program
    Pipeline((*passes, item)).run(program, Target(), verify="numeric")
    made = program.history[-1].rewrites
    _require(made == rewrites, f"{item.name} made {made} rewrites, not {rewrites}")
    if contains is not None:
        there, wanted = ", ".join(sorted(program.op_counts())), op_name(getattr(contains, "overload", contains))
        _require(calls(program, contains), f"after {item.name} there is no call of {wanted}; there are {there}")
    text = str(program)
    again = item.apply(program, Target())
    _require(again == 0, f"{item.name}, applied once more, made {again} rewrites; a pass must find nothing left to do")
    _require(str(program) == text, f"{item.name}, applied once more, reported no rewrite but changed the program")
    return program


def _require(holds: object, otherwise: str) -> None:
    if not holds:
        raise AssertionError(otherwise)
