"""In-place ops of an exported graph become functional ones, where that is plainly right; much cheaper than a second trace."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

aten = torch.ops.aten
KEPT = {aten.detach_.default}
"""Ops marked as writing that do not change values."""
SCATTERS: dict[Any, Any] = {aten.slice.Tensor: aten.slice_scatter.default, aten.select.int: aten.select_scatter.default}
"""View of a part -> the op that returns the whole with another part in its place."""


def mutates(node: fx.Node) -> bool:
    """Writes into a tensor."""
    target = node.target
    return isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable and target not in KEPT


def functionalize(graph: fx.Graph) -> bool:
    """Replace every write by ops that return the new value; False, with nothing changed, when one is not plainly right.

    It is right when the op has such a form and, behind it, nobody reads the storage through an older name of it.
    """
    order = {node: i for i, node in enumerate(graph.nodes)}
    writes = [node for node in graph.nodes if mutates(node)]
    if not all(_has_form(node) and _is_last_reader(node, order) for node in writes):
        return False
    for node in writes:
        base = _base(node)
        new = _assign_part(graph, node) if node.target is aten.copy_.default else node
        if new is node:
            node.target = _functional(node)
        base.replace_all_uses_with(new, delete_user_cb=lambda user, at=node: order.get(user, -1) > order[at])
    return True


def _has_form(node: fx.Node) -> bool:
    if node.target is not aten.copy_.default:
        return _functional(node) is not None
    args: Any = node.args
    part, source = (value.meta["val"] for value in args[:2])
    return part.shape == source.shape and part.dtype == source.dtype and not node.users and args[0].target in SCATTERS


def _functional(node: fx.Node) -> Any:
    """aten.div_.Tensor -> aten.div.Tensor; None when the op has no such form or writes to more than its first argument."""
    target: Any = node.target
    args: Any = node.args
    first, *others = target._schema.arguments
    name = target.overloadpacket.__name__
    if not first.alias_info or any(other.alias_info for other in others) or not name.endswith("_"):
        return None
    form = getattr(getattr(aten, name[:-1], None), target._overloadname, None)
    same = form is not None and [a.name for a in form._schema.arguments] == [a.name for a in target._schema.arguments]
    return form if same and args[0].meta["val"].dtype == node.meta["val"].dtype else None


def _base(write: fx.Node) -> fx.Node:
    """The tensor whose later readers see the write: what is written, or what a part of which is assigned."""
    node: Any = write.args[0]
    while write.target is aten.copy_.default and node.target in SCATTERS:
        node = node.args[0]
    return node


def _assign_part(graph: fx.Graph, write: fx.Node) -> fx.Node:
    """copy_(slice(slice(x, a), b), y) -> slice_scatter(x, slice_scatter(slice(x, a), y, b), a)."""
    args: Any = write.args
    part, new = args
    with graph.inserting_before(write):
        while part.target in SCATTERS:
            whole, *where = part.args
            new = graph.call_function(SCATTERS[part.target], (whole, new, *where))
            new.meta |= {**write.meta, "val": whole.meta["val"]}
            part = whole
    graph.erase_node(write)
    return new


def _is_last_reader(write: fx.Node, order: dict[fx.Node, int]) -> bool:
    """No earlier name of the written storage is read behind the write, and it is not that of a parameter or input."""
    base = _base(write)
    names = {name for name in _aliases(base) if order[name] < order[write]}
    if any(name.op != "call_function" for name in names):
        return False
    return all(order[user] <= order[write] for name in names - {base} for user in name.users)


def _aliases(node: fx.Node) -> set[fx.Node]:
    """All nodes that may share the storage of this one."""
    found, waiting = set[fx.Node](), [node]
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting += [arg for arg in name.all_input_nodes if _shares(name, arg)]
            waiting += [user for user in name.users if _shares(user, name)]
    return found


def _shares(node: fx.Node, arg: fx.Node) -> bool:
    """May the result of a call share the storage of an argument? Anything may but plain ops and what they return several of."""
    if node.target is operator.getitem and isinstance(arg.target, torch._ops.OpOverload):
        return any(result.alias_info for result in arg.target._schema.returns)
    if not isinstance(node.target, torch._ops.OpOverload):
        return node.op == "call_function"
    given = zip(node.target._schema.arguments, node.args, strict=False)
    return any(argument.alias_info and (value is arg or isinstance(value, list | tuple)) for argument, value in given)
