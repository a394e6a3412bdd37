"""ShardPlan: which rank has what of each parameter and value, and where ranks exchange something. Plain, frozen, printable."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import fx

from autodeploy import custom_ops as ops
from autodeploy.program import Program
from autodeploy.specs import Mesh
from autodeploy.transforms.layouts import Layout
from autodeploy.transforms.rewrite import arguments, aten


@dataclass(frozen=True)
class Share:
    """How ranks share one parameter."""

    kind: str
    """column, row (of linears, by what is dealt out: results or inputs), vocabulary, expert, part (others), or replicate."""
    layout: Layout
    is_linear: bool = False


@dataclass(frozen=True)
class ShardPlan:
    mesh: Mesh
    parameters: Mapping[str, Share]
    """Every parameter of the program."""
    values: Mapping[str, Any]
    """Node -> what ranks have of its value (a list of it, for a list), where that is not all."""
    reduced: Mapping[str, Sequence[str]]
    """Node whose terms are added up -> the nodes that read the sum."""
    gathered: Mapping[str, int]
    """Node whose parts are put together -> along which dim."""
    refused: Mapping[str, str]
    """Call whose heads, experts or columns cannot be dealt out -> why."""

    @classmethod
    def of(
        cls,
        program: Program,
        mesh: Mesh,
        parameters: Mapping[str, Layout],
        values: Mapping[str, Any],
        reduced: Mapping[str, Sequence[str]],
        gathered: Mapping[str, int],
        refused: Mapping[str, str],
    ) -> ShardPlan:
        kinds = _kinds(program)
        shares = {name: _share(kinds.get(name, "part"), parameters.get(name, Layout())) for name in program.weights}
        return cls(mesh, shares, values, reduced, gathered, refused)

    def linears(self) -> dict[str, str]:
        """The weight of each linear -> how ranks share it."""
        return {name: share.kind for name, share in self.parameters.items() if share.is_linear}

    def __str__(self) -> str:
        """One line for all layers whose parameters are shared in the same way."""
        lines = defaultdict[tuple[str, str], int](int)
        for name, share in self.parameters.items():
            lines[re.sub(r"\.\d+\.", ".*.", name), f"{share.kind}: {share.layout}"] += 1
        width = max((len(name) for name, _ in lines), default=0)
        mesh = ", ".join(f"{axis} {size}" for axis, size in asdict(self.mesh).items())
        shown = [f"shard plan ({mesh}; {len(self.reduced)} sums, {len(self.gathered)} gathers)"]
        shown += [f"  {name:<{width}}  {count:>4} x {how}" for (name, how), count in lines.items()]
        return "\n".join(shown + [f"  not shared: {node}, {reason}" for node, reason in self.refused.items()])

    def to_json(self) -> dict[str, Any]:
        return {
            "mesh": asdict(self.mesh),
            "parameters": {
                name: {"kind": share.kind, "dims": {str(dim): ranges for dim, ranges in share.layout.dims.items()}}
                for name, share in self.parameters.items()
            },
            "reduced": {name: list(readers) for name, readers in self.reduced.items()},
            "gathered": dict(self.gathered),
            "refused": dict(self.refused),
        }


HINTS = {
    "colwise": "column",
    "colwise_rep": "column",
    "colwise_gather_output": "column",
    "packed_colwise": "column",
    "rowwise": "row",
    "rowwise_rep": "row",
    "rowwise_split_input": "row",
    "packed_rowwise": "row",
    "embedding_rowwise": "vocabulary",
    "embedding_colwise": "column",
    "replicated_with_grad_allreduce": "replicate",
    "mla_kv_a_proj": "replicate",
    "replicate": "replicate",
}
"""Styles of transformers' own plans, as far as they are about one matrix -> kinds."""


def disagreements(plan: ShardPlan, hints: Mapping[str, str] | None) -> list[str]:
    """Where the plan differs from transformers' own for the same model, each kind of module once.

    hints: pattern of module names (* for a number) -> style. What they do not name has no opinion on it; experts, which the mesh
    deals out in one way or the other, are not compared.
    """
    found = dict[str, None]()
    for name, share in plan.parameters.items():
        pattern = re.sub(r"\.\d+(?=\.|$)", ".*", name.removesuffix(".weight"))
        told = next((HINTS.get(style) for hint, style in (hints or {}).items() if pattern in (hint, f"model.{hint}")), None)
        if told is not None and share.kind != "expert" and told != _comparable(share):
            found[f"{pattern}: {share.kind} here, {told} there"] = None
    return list(found)


def _comparable(share: Share) -> str:
    """The kind, of vectors too by what is dealt out."""
    if share.kind == "part":
        return "column" if share.layout.dims else "replicate"
    return "column" if share.kind == "vocabulary" and share.is_linear else share.kind


def _share(kind: str, layout: Layout) -> Share:
    is_linear = kind in ("linear", "transposed")
    if not layout.dims:
        return Share("replicate", layout, is_linear)
    if not is_linear:
        return Share(kind, layout)
    return Share("column" if (0 in layout.dims) == (kind == "linear") else "row", layout, True)


def _kinds(program: Program) -> dict[str, str]:
    """Parameter -> what it is: a linear's weight, a table, experts."""
    found = dict[str, str]()
    for node in program.graph.graph.nodes:
        match node.target:
            case aten.embedding.default:
                _note(found, node, "vocabulary", "weight")
            case aten.linear.default:
                _note(found, node, "linear", "weight")
            case aten.addmm.default:
                _note(found, node, "transposed", "mat2")
            case ops.moe.overload:
                _note(found, node, "expert", "gate_up", "down", "gate_up_bias", "down_bias")
    return found


def _note(found: dict[str, str], node: fx.Node, kind: str, *names: str) -> None:
    given = arguments(node)
    for name in names:
        if isinstance(parameter := given[name], fx.Node):
            found.setdefault(str(parameter.target), kind)
