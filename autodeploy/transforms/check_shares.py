"""check_shares: what ranks have of every value of a sharded program, derived from its recipes and calls alone, is what the whole
model computes. A sum that is missing, a part of the wrong dim, a bias added twice: each is found here, by node."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

from torch import Tensor, fx

from autodeploy import custom_ops as ops
from autodeploy.program import NodeRecord, Program, Snapshot, op_name
from autodeploy.recipes import Numbers, Ranges, Reshape, Shard
from autodeploy.transforms.layouts import WHOLE, Layout, Site, Unshardable, layout_of_recipe, plain
from autodeploy.transforms.ranges import Unaligned, ranges_of
from autodeploy.transforms.rewrite import arguments, val
from autodeploy.transforms.shard import first_numbers, num_ranks
from autodeploy.transforms.shard_rules import rule_of
from autodeploy.transforms.verify import VerificationError


def check_shares(before: Snapshot, program: Program) -> None:
    """Raises VerificationError. before: the program as it was when every rank had all of it."""
    _Check(before, program, {record.node: record for record in before.nodes}, num_ranks(program)).run()


@dataclass
class _Check:
    before: Snapshot
    program: Program
    records: Mapping[fx.Node, NodeRecord]
    num_ranks: int
    layouts: dict[fx.Node, Any] = field(default_factory=dict)
    stands_for: dict[fx.Node, fx.Node] = field(default_factory=dict)
    """Node -> that of the whole model whose value it has, or has a part of."""

    def run(self) -> None:
        for node in self.program.graph.graph.nodes:
            try:
                self._look_at(node)
            except (Unshardable, Unaligned) as error:
                raise VerificationError(f"{op_name(node.target)}: {error}", node.name) from error

    def _look_at(self, node: fx.Node) -> None:
        record = self.records.get(node)
        self.stands_for[node] = node
        if node.op == "placeholder":
            self.layouts[node] = WHOLE
        elif node.op == "get_attr":
            self.layouts[node] = self._parameter(node, record)
        elif node.op == "output":
            for source in node.all_input_nodes:
                if not self.layouts[source].is_whole:
                    raise Unshardable(f"the result must be whole, and of {source.name} ranks have {self.layouts[source]}")
        elif record is None:
            self._exchange(node)
        else:
            self._call(node, record)

    def _parameter(self, node: fx.Node, record: NodeRecord | None) -> Layout:
        name = str(node.target)
        whole = self.before.program.weights.recipes.get(name)
        if record is None or whole is None:
            return WHOLE  # the numbers of ranks; looked at where they are used
        shape = self.before.tensors[name].shape
        layout = layout_of_recipe(self.program.weights[name], whole, len(shape))
        if layout is None:
            raise Unshardable(f"{self.program.weights[name]} is no part of {whole}")
        self._same_shape(node, layout, shape)
        return layout

    def _same_shape(self, node: fx.Node, layout: Layout, shape: Any) -> None:
        have, want = tuple(map(str, val(node).shape)), tuple(map(str, layout.local_shape(tuple(shape))))
        if have != want:
            raise Unshardable(f"it is {list(have)}, and with {layout} it would be {list(want)}")

    def _exchange(self, node: fx.Node) -> None:
        """A call that the whole model does not make."""
        source: Any = node.args[0]
        layout: Layout = self.layouts[source]
        self.stands_for[node] = self.stands_for[source]
        match node.target:
            case ops.all_reduce.overload:
                if not layout.is_term:
                    raise Unshardable(f"it adds up {source.name}, of which ranks have no terms but {layout}")
                self.layouts[node] = WHOLE
            case ops.all_gather.overload:
                dim, size = cast(tuple[int, int], node.args[1:])
                kept = [pair for own in layout.dims.get(dim, ()) for pair in own]
                if set(layout.dims) != {dim} or layout.is_term or _without_end(kept) != (((0, size),),):
                    raise Unshardable(f"put together along dim {dim}, parts of {source.name} ({layout}) do not give all of it")
                self.layouts[node] = WHOLE
            case ops.local_index.overload:
                count: Any = node.args[2]
                if not layout.is_whole:
                    raise Unshardable(f"it needs all of {source.name}, and ranks have {layout}")
                self.layouts[node] = Layout(counted=tuple(((first, first + count),) for first in self._firsts(node.args[1])))
            case _:
                raise Unshardable("the whole model has no such call")

    def _firsts(self, parameter: Any) -> tuple[int, ...]:
        """The number that each rank has."""
        match self.program.weights[str(parameter.target)]:
            case Reshape(Shard(Numbers(values), -1, ranges), ()) if all(len(own) == 1 for own in ranges):
                return tuple(values[own[0][0]] for own in ranges)
            case recipe:
                raise Unshardable(f"{recipe} is no number of a rank")

    def _call(self, node: fx.Node, record: NodeRecord) -> None:
        rule, whole, given = rule_of(record.target), arguments(record), arguments(node)
        layouts = self._read(whole, given)
        value = self._value
        site = Site(record.target, whole, record.meta["val"], layouts, value, self.num_ranks, node.meta.get("wanted"))
        out = plain(rule.forward(site), site.out)
        if rule.target(site) is not node.target:
            raise Unshardable(f"with these parts ranks must call {op_name(rule.target(site))}")
        expected = {**whole, **rule.local(site, out)}
        if node.target is ops.sharded_embedding.overload:
            self._check_first(given["first"], site.layout(whole["weight"]).dims[0])
            expected["first"] = None
        for name, argument in expected.items():
            if name in given and _numbers(given[name]) != _numbers(argument):
                raise Unshardable(f"its {name} is {given[name]}, and a rank's is {argument}")
        self.layouts[node] = out
        if isinstance(out, Layout) and isinstance(val(node), Tensor):
            self._same_shape(node, out, record.meta["val"].shape)

    def _check_first(self, parameter: Any, ranges: Ranges) -> None:
        if self._firsts(parameter) != first_numbers(ranges):
            raise Unshardable(f"ranks look from {self._firsts(parameter)} on, and have rows from {first_numbers(ranges)} on")

    def _value(self, node: Any) -> Any:
        """The whole model's."""
        return self.records[node].meta["val"] if isinstance(node, fx.Node) else node

    def _read(self, whole: Mapping[str, Any], given: Mapping[str, Any]) -> dict[fx.Node, Any]:
        """What ranks have of each argument of the whole model's call, which must be the same value as there."""
        found = dict[fx.Node, Any]()
        for name, argument in whole.items():
            mine, theirs = _nodes(given.get(name)), _nodes(argument)
            if len(mine) != len(theirs):
                raise Unshardable(f"it reads other values as its {name}")
            for actual, original in zip(mine, theirs, strict=True):
                layout = self.layouts[actual]
                if self.stands_for[actual] is not original:
                    raise Unshardable(f"it reads {actual.name} in place of {original.name}")
                if original in found and found[original] != layout:
                    raise Unshardable(f"it reads {original.name} with and without its sum")
                found[original] = layout
        return found


def _without_end(pairs: list[tuple[int, int]]) -> Ranges:
    """One behind the other, without the zeros behind the last one."""
    (joined,) = ranges_of([pairs])
    return (joined[:-1] if joined and joined[-1][0] < 0 else joined,)


def _nodes(argument: Any) -> list[fx.Node]:
    found = list[fx.Node]()
    fx.map_arg(argument, lambda node: found.append(node) or node)
    return found


def _numbers(argument: Any) -> Any:
    """What of an argument is no node, in its place."""
    if isinstance(argument, fx.Node):
        return None
    if isinstance(argument, list | tuple):
        return [_numbers(item) for item in argument]
    return argument
