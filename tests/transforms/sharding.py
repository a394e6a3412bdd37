"""Programs of small families before and after the pass that shares their layers among ranks."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

from autodeploy import Effect
from autodeploy.capture.export import capture
from autodeploy.capture.skeleton import skeleton_of
from autodeploy.program import Program, Snapshot
from autodeploy.specs import Mesh, Target
from autodeploy.transforms.default import default_pipeline
from autodeploy.transforms.pipeline import Pipeline
from autodeploy.transforms.shard import ShardModel
from autodeploy.transforms.verify_numeric import NumericVerifier, leaf_types
from tests.models.families import make_model


@dataclass
class Shared:
    """A program that ranks share; what it was before; how its numbers are compared."""

    before: Snapshot
    program: Program
    rewrites: int
    verifier: NumericVerifier

    def compare(self) -> None:
        """In float64, on all ranks at once. Raises VerificationError."""
        self.verifier.compare(self.before.as_program(), self.program, Effect.REWRITE)


def canonical(family: str, **overrides: Any) -> tuple[Program, NumericVerifier]:
    """A family's program as the pass finds it, one of its own each time."""
    snapshot, verifier = _captured(family, tuple(overrides.items()))
    return snapshot.as_program(), verifier


@cache
def _captured(family: str, overrides: tuple[tuple[str, Any], ...]) -> tuple[Snapshot, NumericVerifier]:
    model = make_model(family, **dict(overrides))
    program = capture(skeleton_of(model), dict(model.named_buffers())).program
    verifier, default = NumericVerifier(leaf_types(program)), default_pipeline()
    Pipeline(default.passes[: default.index("match_mlp") + 1]).run(program, Target(), verify="off")
    return program.snapshot(), verifier


def shared(family: str, mesh: Mesh, *, item: ShardModel | None = None, **overrides: Any) -> Shared:
    """The program after the pass, verified by derivation."""
    program, verifier = canonical(family, **overrides)
    before = program.snapshot()
    Pipeline((item or ShardModel(),)).run(program, Target(mesh=mesh))
    return Shared(before, program, program.history[-1].rewrites, verifier)
