"""shard: ranks share each layer, as the plan says: parameters by recipe, sizes in calls, and sums where terms meet."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import fx

from autodeploy import custom_ops as ops
from autodeploy.custom_ops.op import argument_defaults
from autodeploy.errors import UnsupportedModelError
from autodeploy.program import Choice, Program
from autodeploy.recipes import Numbers, Ranges, Recipe, Reshape, Shard
from autodeploy.specs import Target
from autodeploy.transforms.base import Effect, Transform
from autodeploy.transforms.layouts import WHOLE, Layout, Site
from autodeploy.transforms.plan_sharding import plan_sharding
from autodeploy.transforms.rewrite import (
    arguments,
    derive_again,
    insert_call,
    insert_parameter,
    note_choice,
    set_arguments,
    set_parameter,
    val,
)
from autodeploy.transforms.shard_moves import Created, Expanded
from autodeploy.transforms.shard_plan import ShardPlan, disagreements
from autodeploy.transforms.shard_rules import rule_of


@dataclass(frozen=True, kw_only=True)
class ShardModel(Transform):
    """Heads, columns, experts and rows of the vocabulary are dealt out to `mesh.tp` ranks; one program serves them all.

    before:  y = linear(view(attention(...), [1, T, 64]), o_proj.weight)
    after:   y = all_reduce(linear(view(attention(...), [1, T, 32]), o_proj.weight))    shard(o_proj.weight, dim=-1, 0:32|32:64)
    """

    name: ClassVar[str] = "shard"
    effect: ClassVar[Effect] = Effect.SHARDING
    replicate: bool = False
    """Whether every rank computes all of what cannot be shared; else that is an error."""
    rules: Mapping[str, str] = field(default_factory=dict[str, str])
    """Pattern of parameter names -> the kind of share that it must get: replicate, column, row, vocabulary, expert or part."""
    hints: Mapping[str, str] = field(default_factory=dict[str, str])
    """transformers' own plan, pattern of module names -> style; where it differs is written down."""

    def apply(self, program: Program, target: Target) -> int:
        if target.mesh.tp == 1 or is_sharded(program):
            return 0
        plan = plan_sharding(program, target.mesh, self.rules)
        if plan.refused and not self.replicate:
            (node, reason), *more = plan.refused.items()
            rest = f" (and {len(more)} more)" if more else ""
            raise UnsupportedModelError(
                f"ranks cannot share {node}: {reason}{rest}. Use tensor_parallel_size=1, or have every rank compute it: "
                "pipeline=lambda passes: passes.configure('shard', replicate=True)"
            )
        differing = disagreements(plan, self.hints)
        note_choice(program, "shard", Choice("plan_sharding", {"transformers": tuple(differing)} if differing else {}))
        return _Rewrite(program, plan).run()


def is_sharded(program: Program) -> bool:
    """Whether the parameters are those of ranks."""
    return num_ranks(program) > 1


def num_ranks(program: Program) -> int:
    """How many ranks share the program's layers."""
    return max((_ranks_of(recipe) for recipe in program.weights.recipes.values()), default=1)


def _ranks_of(recipe: Recipe) -> int:
    own = len(recipe.ranges) if isinstance(recipe, Shard) else 1
    return max([own, *map(_ranks_of, recipe.sources)])


@dataclass(frozen=True)
class _Change:
    """What becomes of one call."""

    node: fx.Node
    target: Any
    args: Mapping[str, Any]
    """Those that change, by name."""


@dataclass
class _Rewrite:
    program: Program
    plan: ShardPlan

    def run(self) -> int:
        nodes = list(self.program.graph.graph.nodes)
        changes = [change for node in nodes if node.op == "call_function" and (change := self._change(node)) is not None]
        for name, share in self.plan.parameters.items():
            if share.layout.dims:
                self._cut(name, share.layout)
        for change in changes:
            _edit(change)
        self._derive(nodes)
        by_name = {node.name: node for node in nodes}
        for name, readers in self.plan.reduced.items():
            self._insert(by_name[name], [by_name[reader] for reader in readers], ops.all_reduce)
        for name, dim in self.plan.gathered.items():
            node = by_name[name]
            self._insert(node, list(node.users), ops.all_gather, dim, self.sizes[name])
        return len(changes) + len(self.plan.reduced) + len(self.plan.gathered)

    def layout(self, node: fx.Node, reader: fx.Node) -> Any:
        """What ranks have of a value, as one of its readers finds it."""
        if node.op == "get_attr":
            return self.plan.parameters[str(node.target)].layout
        found = self.plan.values.get(node.name, WHOLE)
        return WHOLE if reader.name in self.plan.reduced.get(node.name, ()) else found

    def _change(self, node: fx.Node) -> _Change | None:
        layouts = {source: self.layout(source, node) for source in node.all_input_nodes}
        out, given = self.plan.values.get(node.name, WHOLE), arguments(node)
        if all(layout == WHOLE for layout in (out, *layouts.values())):
            return None
        wanted = out if isinstance(rule_of(node.target), Expanded | Created) else None
        site = Site(node.target, given, val(node), layouts, val, self.plan.mesh.tp, wanted)
        rule = rule_of(node.target)
        args, target = rule.local(site, out), rule.target(site)
        if wanted is not None:
            node.meta["wanted"] = wanted
        if target is ops.sharded_embedding.overload:
            args = {"first": self._first(node, site.layout(given["weight"]).dims[0])}
        if node.target is ops.moe.overload and (experts := site.layout(given["down"]).dims.get(0)) is not None:
            count = sum(stop - start for start, stop in experts[0])
            index = insert_call(self.program, node, ops.local_index, given["expert_index"], self._first(node, experts), count)
            args = {"expert_index": index}
        return _Change(node, target, args) if args or target is not node.target else None

    def _first(self, before: fx.Node, ranges: Ranges) -> fx.Node:
        """A parameter [] that is, on each rank, the first of what it has."""
        firsts = first_numbers(ranges)
        name = f"first_of_rank.{'_'.join(map(str, firsts[:2]))}_{sum(stop - start for start, stop in ranges[0])}"
        if name not in self.program.weights:
            self.program.weights = self.program.weights.with_recipes({name: first_recipe(firsts)})
        return insert_parameter(self.program, before, name, torch.empty((), dtype=torch.int64, device="meta"))

    def _cut(self, name: str, layout: Layout) -> None:
        """Each rank has its part of a parameter."""
        program, whole = self.program, self.program.parameter(name)
        recipe = layout.recipe(program.weights[name], whole.dim())
        program.weights = program.weights.with_recipes({name: recipe})
        value = torch.empty(layout.local_shape(tuple(whole.shape)), dtype=whole.dtype, device="meta")
        set_parameter(program, name, value)

    def _derive(self, nodes: list[fx.Node]) -> None:
        """Every value anew; `sizes` keeps the whole ones of what will be gathered."""
        gathered = self.plan.gathered
        self.sizes = {node.name: val(node).shape[gathered[node.name]] for node in nodes if node.name in gathered}
        for node in self.program.graph.graph.nodes:
            if node.op == "call_function":
                derive_again(self.program, node)

    def _insert(self, node: fx.Node, readers: list[fx.Node], op: Any, *args: Any) -> None:
        """A collective behind a value, for these readers of it."""
        made = insert_call(self.program, node.next, op, node, *args)
        for reader in readers:
            reader.replace_input_with(node, made)


def first_numbers(ranges: Ranges) -> tuple[int, ...]:
    """Of each rank; of one that has nothing, a number behind all others."""
    stop = max(stop for own in ranges for _, stop in own)
    return tuple(own[0][0] if own[0][0] >= 0 else stop for own in ranges)


def first_recipe(firsts: tuple[int, ...]) -> Recipe:
    each = tuple(((rank, rank + 1),) for rank in range(len(firsts)))
    return Reshape(Shard(Numbers(firsts), -1, each), ())


def _edit(change: _Change) -> None:
    node = change.node
    if change.target is not node.target:
        given = {**arguments(node), **change.args}
        node.target = change.target
        node.args, node.kwargs = tuple(given[name] for name in argument_defaults(change.target)), {}
        return
    set_arguments(node, change.args)
