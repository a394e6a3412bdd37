"""fuse_linears: linears that read the same tensor become one."""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from autodeploy.formats import told
from autodeploy.program import Program
from autodeploy.recipes import Cat
from autodeploy.specs import Target
from autodeploy.transforms.base import Effect, Transform
from autodeploy.transforms.rewrite import aten, calls, erase_unused, insert_call, insert_parameter, pass_on_strides, val


@dataclass(frozen=True, kw_only=True)
class FuseLinears(Transform):
    """Query, key and value projections (and gate and up) as one matrix product, the weights joined by recipe.

    before:  q = linear(x, Wq); k = linear(x, Wk); v = linear(x, Wv)
    after:   q, k, v = split(linear(x, cat(Wq, Wk, Wv)))
    """

    name: ClassVar[str] = "fuse_linears"
    effect: ClassVar[Effect] = Effect.PARAMETERS

    def apply(self, program: Program, target: Target) -> int:
        groups: dict[Any, dict[Any, list[fx.Node]]] = defaultdict(lambda: defaultdict(list))
        for node in calls(program, aten.linear.default):
            if _fusable(node):
                stored = program.weights.format_of(_name(node))
                kind = _name(node) if stored is not None and "order" in stored.parts else stored  # each has an order of its own
                groups[node.args[0], _bias(node) is None, val(node.args[1]).dtype][kind].append(node)
        for by_format in groups.values():
            _remark(program, [_name(group[0]) if len(group) == 1 else _fuse(program, group) for group in by_format.values()])
        return sum(len(group) > 1 for by_format in groups.values() for group in by_format.values())


def _bias(node: fx.Node) -> Any:
    return node.args[2] if len(node.args) > 2 else None


def _fusable(node: fx.Node) -> bool:
    """Weight and bias are parameters of this linear alone (a tied table stays what it is)."""
    parameters = [arg for arg in (node.args[1], _bias(node)) if arg is not None]
    alone = all(isinstance(arg, fx.Node) and arg.op == "get_attr" and len(arg.users) == 1 for arg in parameters)
    return alone and not node.kwargs


def _name(linear: fx.Node) -> str:
    weight: Any = linear.args[1]
    return str(weight.target)


def _remark(program: Program, weights: Sequence[str]) -> None:
    """Say which of these are not joined, though they belong to one module, since they are stored in several formats."""
    modules: dict[str, list[str]] = defaultdict(list)
    for name in weights:
        modules[name.rsplit(".", 2)[0]].append(name)
    for names in modules.values():
        formats = {program.weights.format_of(name) for name in names}
        if len(formats) > 1:
            reason = f"not joined, since what reads the same is stored in several formats ({told(formats)})"
            program.remarks |= dict.fromkeys(names, reason)


def _fuse(program: Program, group: list[fx.Node]) -> str:
    """The name of the joined weight."""
    first = group[0]
    joined = [_join(program, first, [node.args[i] for node in group]) for i in ((1,) if _bias(first) is None else (1, 2))]
    product = insert_call(program, first, aten.linear.default, first.args[0], *joined)
    sizes = [val(node).shape[-1] for node in group]
    parts = insert_call(program, first, aten.split_with_sizes.default, product, sizes, -1)
    for i, node in enumerate(group):
        node.replace_all_uses_with(insert_call(program, first, operator.getitem, parts, i))
    erase_unused(*group)
    pass_on_strides(program, [user for part in parts.users for user in part.users])
    return str(joined[0].target)


def _join(program: Program, before: fx.Node, parameters: list[Any]) -> fx.Node:
    """One parameter out of several, along their first dim, named after all of them."""
    names = [str(node.target) for node in parameters]
    paths = [name.split(".") for name in names]
    parent = paths[0][:-2] if len({tuple(path[:-2]) for path in paths}) == 1 else []
    leaf = "_".join(path[-2] for path in paths) if parent else "_".join(name.replace(".", "_") for name in names)
    name = ".".join([*parent, leaf, paths[0][-1]])
    recipe = Cat(tuple(program.weights[source] for source in names), dim=0)
    program.weights = program.weights.with_recipes({name: recipe})
    value = torch.cat([program.parameter(source) for source in names])
    return insert_parameter(program, before, name, value)
