"""One repeated layer of a program as plain data, chosen by what depends on what: no names of modules are needed.

Every value that leads from one attention call to the logits passes some nodes that no path goes around. The last of them that the
next attention call still depends on (a sum of the residual stream, as a rule) is where one layer ends and the next begins.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import networkx as nx
import torch
from torch import fx

from autodeploy.custom_ops import PROVIDED, SEMANTIC_OPS
from autodeploy.program import Program, op_name
from autodeploy.report.markup import TIMES

KINDS = {
    "linear": "linear mm bmm addmm matmul conv1d embedding",
    "attention": "attention paged_attention kv_append",
    "norm": "rms_norm add_rms_norm layer_norm",
    "rope": "rope rope_append",
    "activation": "gated_activation silu gelu relu sigmoid tanh",
    "movement": "view reshape transpose permute slice cat stack unsqueeze squeeze expand split split_with_sizes getitem select "
    "flatten unflatten contiguous clone index_select to type_as _to_copy alias unbind chunk",
}
"""Kind -> the ops drawn in its colour; all others are arithmetic."""
KIND_OF = {name: kind for kind, names in KINDS.items() for name in names.split()}


@dataclass(frozen=True)
class Box:
    """One op of the layer, or (kind "inlet") a value that comes into it."""

    label: str
    shape: str
    kind: str
    reads: str = ""
    """Parameters and batch inputs, which are not drawn by themselves."""
    statement: str = ""


@dataclass(frozen=True)
class LayerView:
    index: int
    num_layers: int
    boxes: dict[str, Box]
    edges: tuple[tuple[str, str], ...]

    @property
    def num_ops(self) -> int:
        return sum(box.kind != "inlet" for box in self.boxes.values())


def view_layer(program: Program) -> LayerView:
    """The second of three or more layers, else the first; the whole graph when it has no two layers."""
    graph = dependence(program)
    bounds = layer_bounds(graph)
    index = 1 if len(bounds) > 2 else 0
    start, stop = bounds[index]
    inside = {stop, *nx.ancestors(graph, stop)}
    if start is not None:
        inside -= {start, *nx.ancestors(graph, start)}
    members = [node for node in program.graph.graph.nodes if node in inside and _is_drawn(node)]
    return _as_data(program, graph, members, index, len(bounds))


def dependence(program: Program) -> nx.DiGraph:
    """Node -> its users; what writes into a cache comes before what reads that cache later."""
    graph, writers = nx.DiGraph(), dict[fx.Node, fx.Node]()
    for node in program.graph.graph.nodes:
        graph.add_node(node)
        graph.add_edges_from((source, node) for source in node.all_input_nodes)
        caches = [source for source in node.all_input_nodes if source.name in program.caches]
        graph.add_edges_from((writers[cache], node) for cache in caches if cache in writers)
        if not node.users:
            writers.update(dict.fromkeys(caches, node))
    return graph


def layer_bounds(graph: nx.DiGraph) -> list[tuple[fx.Node | None, fx.Node]]:
    """(last node of the layer before or None, last node of the layer), in order."""
    output = next(node for node in graph if node.op == "output")
    calls = [node for node in graph if semantic_name(node) in ("attention", "paged_attention")]
    dominators = nx.immediate_dominators(graph.reverse(copy=False), output)
    cuts = [_cut(graph, dominators, node, following) for node, following in pairwise(calls)]
    ends: list[fx.Node] = [*dict.fromkeys(cut for cut in cuts if cut is not None), output]
    return list(zip([None, *ends], ends, strict=False))


def _cut(graph: nx.DiGraph, dominators: dict[Any, Any], call: fx.Node, following: fx.Node) -> fx.Node | None:
    before, found, node = nx.ancestors(graph, following), None, dominators.get(call)
    while node in before:
        found, node = node, dominators.get(node)
    return found


def semantic_name(node: fx.Node) -> str | None:
    """The semantic op that a node calls, by itself or through a provider."""
    op = PROVIDED[node.target][0] if node.target in PROVIDED else SEMANTIC_OPS.get(node.target)
    return None if op is None else op.name


def _is_drawn(node: fx.Node) -> bool:
    return node.op == "call_function" and not isinstance(node.meta.get("val"), torch.SymInt | int)


def _as_data(program: Program, graph: nx.DiGraph, members: list[fx.Node], index: int, num_layers: int) -> LayerView:
    statements = _statements(program)
    boxes, edges, inside = dict[str, Box](), list[tuple[str, str]](), set(members)
    for node in members:
        sources = [source for source in graph.predecessors(node) if source in inside or _is_inlet(source, program)]
        for source in sources:
            edges.append((source.name, node.name))
            if source not in inside:
                cache = program.caches.get(source.name)
                shape = type(cache).__name__ if cache else shape_of(source)
                boxes[source.name] = Box(source.name, shape, "inlet", statement=statements.get(source.name, str(cache or "")))
        boxes[node.name] = _box(node, statements.get(node.name, ""))
    return LayerView(index, num_layers, boxes, tuple(edges))


def _is_inlet(node: fx.Node, program: Program) -> bool:
    return _is_drawn(node) or node.name in program.caches


def _box(node: fx.Node, statement: str) -> Box:
    label = semantic_name(node) or op_name(node.target).split(".")[1]
    read = [source for source in node.all_input_nodes if source.op in ("get_attr", "placeholder")]
    names = [str(source.target) for source in read if source.op == "get_attr" or "cache" not in source.name]
    short = [name.removesuffix(".weight").rpartition(".")[2] for name in names]
    return Box(label, shape_of(node), KIND_OF.get(label, "arithmetic"), ", ".join(short), statement)


def shape_of(node: fx.Node) -> str:
    value = node.meta.get("val")
    if isinstance(value, list | tuple):
        return f"{len(value)} tensors"
    if not isinstance(value, torch.Tensor):
        return ""
    return f" {TIMES} ".join(size if size.isdigit() else "T" for size in map(str, value.shape))


def _statements(program: Program) -> dict[str, str]:
    """Node name -> its line of the program's text."""
    lines = (line.strip() for line in str(program).split("\ngraph:\n")[-1].splitlines())
    return {line.partition(":")[0]: line for line in lines}
