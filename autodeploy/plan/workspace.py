"""The memory that values take while a step runs: the most that is alive at once."""

from __future__ import annotations

from collections import defaultdict
from math import prod
from typing import Any

from torch import fx

from autodeploy.custom_ops.op import call_arguments
from autodeploy.plan.calls import is_view, op_name
from autodeploy.plan.products import Sizes
from autodeploy.plan.work import Counting
from autodeploy.program import Program


def workspace_bytes(program: Program, tokens: int, requests: int) -> int:
    """Of a step of so many tokens: each value from the call that makes it to the last that reads it, views with what they view.

    What a call needs while it runs is counted for experts alone: the rows between their products.
    """
    sizes, nodes = Counting(program).sizes(tokens, requests), list(program.graph.graph.nodes)
    owners, last, ending = _owners(nodes), dict[fx.Node, int](), defaultdict[int, list[fx.Node]](list)
    for place, node in enumerate(nodes):
        last |= {owners[value]: place for value in (node, *node.all_input_nodes)}
    for owner, place in last.items():
        ending[place].append(owner)
    alive, most = 0, 0
    for place, node in enumerate(nodes):
        alive += _own_bytes(node, sizes) if owners[node] is node else 0
        most = max(most, alive + _inside(node, sizes))
        alive -= sum(_own_bytes(owner, sizes) for owner in ending[place])
    return most


def _owners(nodes: list[fx.Node]) -> dict[fx.Node, fx.Node]:
    """Node -> the one whose memory its value lies in."""
    owners: dict[fx.Node, fx.Node] = {}
    for node in nodes:
        source = node.args[0] if node.args else None
        owners[node] = owners[source] if isinstance(source, fx.Node) and node.op == "call_function" and is_view(node) else node
    return owners


def _own_bytes(node: fx.Node, sizes: Sizes) -> int:
    return sizes.num_bytes(node) if node.op == "call_function" else 0


def _inside(node: fx.Node, sizes: Sizes) -> int:
    """What experts keep while they run: of each token and expert chosen, a row before and one after the second product."""
    if op_name(node) != "moe":
        return 0
    given: dict[str, Any] = call_arguments(node.target, node.args, node.kwargs)
    _, *down = sizes.shape(given["down"])
    return prod(sizes.shape(given["expert_index"])) * sum(down) * node.meta["val"].element_size()
