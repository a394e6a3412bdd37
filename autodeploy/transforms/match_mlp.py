"""match_mlp: activation(gate) * up becomes one op."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import fx

from autodeploy import custom_ops as ops
from autodeploy.program import Program
from autodeploy.specs import Target
from autodeploy.transforms.base import Effect, Transform
from autodeploy.transforms.rewrite import aten, calls, replace_call, val

ACTIVATIONS: dict[Any, str] = {
    aten.silu.default: "silu",
    aten.gelu.default: "gelu",
    aten.relu.default: "relu",
    aten.sigmoid.default: "sigmoid",
}


@dataclass(frozen=True, kw_only=True)
class MatchMLP(Transform):
    """Gated activations (SwiGLU, GeGLU, ...).

    before:  y = mul(silu(gate), up)
    after:   y = gated_activation(gate, up, silu)
    """

    name: ClassVar[str] = "match_mlp"
    effect: ClassVar[Effect] = Effect.FUSION

    def apply(self, program: Program, target: Target) -> int:
        rewrites = 0
        for node in calls(program, aten.mul.Tensor):
            for activated, up in (node.args, node.args[::-1]):
                if (activation := _activation(activated)) and isinstance(up, fx.Node) and _same_shape(activated, up):
                    replace_call(program, node, ops.gated_activation, activated.args[0], up, activation)  # pyright: ignore
                    rewrites += 1
                    break
        return rewrites


def _activation(node: Any) -> str | None:
    """Name of the activation, when this product is its only user."""
    if not isinstance(node, fx.Node) or len(node.users) != 1 or node.target not in ACTIVATIONS:
        return None
    name = ACTIVATIONS[node.target]
    return "gelu_tanh" if node.kwargs.get("approximate") == "tanh" else name


def _same_shape(a: Any, b: Any) -> bool:
    return str(val(a).shape) == str(val(b).shape) and val(a).dtype == val(b).dtype
