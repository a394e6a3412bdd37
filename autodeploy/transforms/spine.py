"""The shape of a model as its graph shows it: the residual that layers add to, where they end, and what makes the logits."""

from __future__ import annotations

from typing import Any

import networkx as nx
from torch import Tensor, fx

from autodeploy.program import Program
from autodeploy.transforms.rewrite import arguments, aten, val
from autodeploy.transforms.shard_layers import Experts, Headed
from autodeploy.transforms.shard_rules import Linear, Pointwise, rule_of


def spine_of(program: Program) -> set[fx.Node]:
    """What every path from the embedding of a token to its logits goes through: the sums at which layers join the residual."""
    graph = program.graph.graph
    tables = [node for node in graph.nodes if node.target is aten.embedding.default and reads_ids(node)]
    if not tables:
        return set()
    edges = nx.DiGraph()
    seen, todo = {tables[0]}, [tables[0]]
    while todo:
        node = todo.pop()
        for user in node.users:
            edges.add_edge(node, user)
            if user not in seen:
                seen.add(user)
                todo.append(user)
    dominators = nx.immediate_dominators(edges, tables[0])
    node, spine = graph.output_node(), set[fx.Node]()
    while node in dominators and node is not tables[0] and node not in spine:
        spine.add(node)
        node = dominators[node]
    return spine | {tables[0]}


def inputs_of(linear: fx.Node) -> tuple[int, fx.Node]:
    """How many numbers a linear reads, and its weight."""
    rule = rule_of(linear.target)
    assert isinstance(rule, Linear)
    weight = rule.parts(arguments(linear))[1]
    return val(weight).shape[rule.inputs], weight


def ends_a_layer(linear: fx.Node, spine: set[fx.Node]) -> bool:
    """Whether a linear of linears is the last one before the residual."""
    rule = rule_of(linear.target)
    assert isinstance(rule, Linear)
    return (
        is_parameter(rule.parts(arguments(linear))[1])
        and _meets(linear, spine, forward=False)
        and not _meets(linear, spine, forward=True)
    )


def _meets(linear: fx.Node, spine: set[fx.Node], *, forward: bool) -> bool:
    """Whether there is another linear, or heads or experts, between this one and the spine."""
    seen, todo = set[Any](), list[Any](linear.users if forward else linear.all_input_nodes)
    while todo:
        node = todo.pop()
        if node in seen or node in spine or not isinstance(node, fx.Node):
            continue
        seen.add(node)
        if isinstance(rule_of(node.target), Linear | Headed | Experts):
            return True
        todo += list(node.users) if forward else node.all_input_nodes
    return False


def head_of(program: Program) -> fx.Node | None:
    """The linear that makes the logits, if only pointwise work follows it."""
    node: Any = program.graph.graph.output_node().args[0]
    while isinstance(node, fx.Node) and node.op == "call_function":
        if isinstance(rule_of(node.target), Linear):
            return node
        streams = [arg for arg in node.all_input_nodes if isinstance(val(arg), Tensor) and val(arg).dim() == val(node).dim()]
        if not isinstance(rule_of(node.target), Pointwise) or len(streams) != 1:
            return None
        node = streams[0]
    return None


def reads_ids(node: fx.Node) -> bool:
    indices = arguments(node)["indices"]
    return isinstance(indices, fx.Node) and indices.op == "placeholder" and indices.name == "input_ids"


def is_parameter(node: Any) -> bool:
    return isinstance(node, fx.Node) and node.op == "get_attr"
