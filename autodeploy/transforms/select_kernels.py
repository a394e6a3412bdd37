"""select_kernels: every semantic op becomes a direct call of one provider's function."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from autodeploy.custom_ops import SEMANTIC_OPS
from autodeploy.program import Program
from autodeploy.specs import Target
from autodeploy.transforms.base import Transform
from autodeploy.transforms.rewrite import val


@dataclass(frozen=True, kw_only=True)
class SelectKernels(Transform):
    """Take the first provider that has nothing against the call; write down which, and the reasons against the others.

    before:  autodeploy.rms_norm(x, weight, eps, 0.0, False)
    after:   pointwise.rms_norm(x, weight, eps, 0.0, False)
    """

    name: ClassVar[str] = "select_kernels"

    def apply(self, program: Program, target: Target) -> int:
        rewrites = 0
        for node in program.graph.graph.nodes:
            if node.op == "call_function" and (op := SEMANTIC_OPS.get(node.target)):
                args, kwargs = fx.map_arg((node.args, node.kwargs), val)  # pyright: ignore
                provider, against = op.choose(target, *args, **kwargs)
                node.target = provider.function
                reasons = "; ".join(f"not {name}: {', '.join(why)}" for name, why in against.items())
                program.providers[op.name] = f"{provider.name}{f' ({reasons})' if reasons else ''}"
                rewrites += 1
        return rewrites
