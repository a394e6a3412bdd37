"""A Program: an FX graph on meta tensors and, beside it, everything that must be known to run it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from autodeploy.custom_ops import SEMANTIC_OPS
from autodeploy.specs import CacheSpec, InputSpec, Level
from autodeploy.weights import WeightPlan


@dataclass(frozen=True)
class PassRecord:
    """What one pass did."""

    name: str
    rewrites: int
    seconds: float
    op_delta: dict[str, int]
    """Op name -> nodes more (or fewer) than before."""


@dataclass
class Program:
    graph: fx.GraphModule
    """Parameters and buffers are meta tensors, read by `get_attr`; every node carries its fake value in `meta["val"]`."""
    inputs: dict[str, InputSpec]
    """Placeholders that the executor fills each step, in order."""
    caches: dict[str, CacheSpec]
    """Placeholders that the executor allocates once, after the inputs."""
    weights: WeightPlan
    rope_thresholds: tuple[int, ...] = ()
    """A request whose length crosses one of these is recomputed from its first token."""
    providers: dict[str, str] = field(default_factory=dict)
    """Semantic op -> the provider chosen, and why not the ones before it."""
    history: list[PassRecord] = field(default_factory=list)

    @property
    def level(self) -> Level:
        """Exported until a pass has run, lowered once caches are in, canonical between."""
        if self.caches:
            return Level.LOWERED
        return Level.CANONICAL if self.history else Level.EXPORTED

    def check(self) -> None:
        """Placeholders are inputs then caches; parameters read are parameters planned; every value is known."""
        placeholders = [node.name for node in self.graph.graph.nodes if node.op == "placeholder"]
        expected = [*self.inputs, *self.caches]
        assert placeholders == expected, f"placeholders are {placeholders}, but inputs and caches are {expected}"
        read = {str(node.target) for node in self.graph.graph.nodes if node.op == "get_attr"}
        planned = set(self.weights)
        assert read == planned, f"read but not planned: {sorted(read - planned)}; planned but not read: {sorted(planned - read)}"
        bare = [node.name for node in self.graph.graph.nodes if node.op != "output" and "val" not in node.meta]
        assert not bare, f"nodes without a value in meta: {bare[:5]}"

    def op_counts(self) -> Counter[str]:
        return Counter(op_name(node.target) for node in self.graph.graph.nodes if node.op == "call_function")

    def parameter(self, name: str) -> torch.Tensor:
        """The meta tensor that stands for a parameter."""
        value: Any = self.graph
        for part in name.split("."):
            value = getattr(value, part)
        return value

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> list[str]:
        graph = self.graph.graph
        lines = [
            f"program ({self.level.value}; passes: {', '.join(record.name for record in self.history) or 'none'})",
            "",
            "inputs:",
        ]
        lines += [f"  {name}: {spec.dtype}[{', '.join(map(str, spec.shape))}]" for name, spec in self.inputs.items()]
        lines += ["caches:", *(f"  {name}: {spec}" for name, spec in self.caches.items())]
        lines += [
            "weights:",
            *(f"  {name}: {_tensor_type(self.parameter(name))} = {self.weights[name]}" for name in self.weights),
        ]
        lines += ["graph:", *(f"  {_statement(node)}" for node in graph.nodes if node.op in ("call_function", "output"))]
        return lines


def op_name(target: Any) -> str:
    """aten.linear, autodeploy.rms_norm, operator.getitem; a chosen provider shows its function's name."""
    if isinstance(target, torch._ops.OpOverload):
        name = str(target)
        return name.removesuffix(".default")
    module = getattr(target, "__module__", "").rpartition(".")[2].lstrip("_")
    return f"{module}.{getattr(target, '__name__', target)}"


def is_semantic(node: fx.Node, name: str) -> bool:
    """Does this node call the semantic op of that name (before a provider is chosen)?"""
    op = SEMANTIC_OPS.get(node.target) if node.op == "call_function" else None
    return op is not None and op.name == name


def _tensor_type(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        shape = ", ".join(_dim(size) for size in value.shape)
        return f"{str(value.dtype).removeprefix('torch.')}[{shape}]"
    return type(value).__name__


def _dim(size: Any) -> str:
    """The one symbolic dimension is T, whatever the tracer called it."""
    if isinstance(size, int):
        return str(size)
    expression = size.node.expr
    return str(expression.subs(dict.fromkeys(expression.free_symbols, "T")))


def _argument(value: Any) -> str:
    if isinstance(value, fx.Node):
        return str(value.target) if value.op == "get_attr" else value.name
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_argument, value)) + "]"
    return str(value).removeprefix("torch.")


def _statement(node: fx.Node) -> str:
    arguments = [*map(_argument, node.args), *(f"{key}={_argument(value)}" for key, value in node.kwargs.items())]
    if node.op == "output":
        return f"return {arguments[0]}"
    call = f"{op_name(node.target)}({', '.join(arguments)})"
    value = node.meta.get("val")
    return call if value is None else f"{node.name}: {_tensor_type(value)} = {call}"
