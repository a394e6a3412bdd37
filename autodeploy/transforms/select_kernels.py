"""select_kernels: every semantic op becomes a direct call of one provider's function."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import fx

from autodeploy.custom_ops import SEMANTIC_OPS, symbolic
from autodeploy.program import Choice, Program
from autodeploy.specs import Target
from autodeploy.transforms.base import Transform
from autodeploy.transforms.rewrite import arguments, note_choice, val


@dataclass(frozen=True, kw_only=True)
class SelectKernels(Transform):
    """Take the first provider that has nothing against the call; write down which, and the reasons against the others.

    before:  autodeploy.rms_norm(x, weight, eps, 0.0, False)
    after:   pointwise.rms_norm(x, weight, eps, 0.0, False)
    """

    name: ClassVar[str] = "select_kernels"
    pack: bool = True
    """Whether a provider may lay out weights anew, which a model in memory then no longer shares."""

    def apply(self, program: Program, target: Target) -> int:
        rewrites, shared = 0, _shared(program)
        for node in program.graph.graph.nodes:
            if node.op == "call_function" and (op := SEMANTIC_OPS.get(node.target)):
                args, kwargs = fx.map_arg((node.args, node.kwargs), val)  # pyright: ignore
                provider, against = op.choose(target, *args, parameters=_parameters(node, shared) if self.pack else (), **kwargs)
                node.target = provider.function
                note_choice(program, op.name, Choice(provider.name, {name: tuple(why) for name, why in against.items()}))
                rewrites += 1
        return rewrites


def _parameters(node: fx.Node, shared: set[str]) -> list[str]:
    """Names of the arguments that are parameters as they are, of calls like this one alone."""
    given = arguments(node).items()
    return [name for name, value in given if isinstance(value, fx.Node) and value.op == "get_attr" and value.target not in shared]


def _shared(program: Program) -> set[str]:
    """Parameters that calls of several kinds read: packed for one, a second copy would stay for the others."""
    readers: dict[str, set[Any]] = defaultdict(set)
    for node in program.graph.graph.nodes:
        if node.op == "get_attr":
            readers[str(node.target)] |= {symbolic(user.target) for user in node.users}
    return {name for name, targets in readers.items() if len(targets) > 1}
