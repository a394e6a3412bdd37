"""split_stages: a lowered program as several, one after the other, each with layers, parameters and caches of its own.

Cut is where what is behind needs as little as possible of what is before: in most models the residual (with its norm, where both
come from one call). What does not depend on token ids or caches, such as rotary angles, every stage computes for itself.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, fx

from autodeploy import custom_ops as ops
from autodeploy.errors import UnsupportedModelError
from autodeploy.program import Program
from autodeploy.transforms.rewrite import insert_call, val

UNEVEN = 1.25
"""Times its share of the parameters that a stage may have without a look for cuts that more crosses."""
WORTH_IT = 0.9
"""Of the largest stage, what must be left of it for those."""


@dataclass(frozen=True)
class Cut:
    """In front of the call at `position` of the stream; crossing: what is computed before and read behind it, in order."""

    position: int
    crossing: tuple[fx.Node, ...] = ()

    @property
    def num_sources(self) -> int:
        """Calls that what crosses comes from."""
        return len({node.all_input_nodes[0] if node.target is operator.getitem else node for node in self.crossing})


def split_stages(program: Program, num_stages: int) -> list[Program]:
    """The stages, balanced by the bytes of their parameters. Raises UnsupportedModelError where it cannot be cut that often.

    Run one after the other on the same inputs they do what the program does; the last one has its output.

    whole:     a = layer_0(embedding(input_ids)); return head(layer_1(a))
    stage 0:   a = layer_0(embedding(input_ids)); return send(a, input_ids)
    stage 1:   a = receive(input_ids, [1, -1, 64], float32); return head(layer_1(a))
    """
    program.derive_values()
    stream = Stream.of(program)
    chosen = [Cut(0), *_chosen(stream, num_stages), Cut(len(stream.calls))]
    return [_stage(stream, before, after) for before, after in pairwise(chosen)]


def _chosen(stream: Stream, num_stages: int) -> Sequence[Cut]:
    """Where what crosses comes from as few calls as possible, if that does not leave one stage with much more than the others."""
    cuts, best = list(stream.cuts()), None
    if len(cuts) < num_stages - 1:
        raise UnsupportedModelError(
            f"this model can be cut at {len(cuts)} places, and {num_stages} stages need {num_stages - 1}. "
            f"Use pipeline_parallel_size={len(cuts) + 1}, or less."
        )
    for most in sorted({cut.num_sources for cut in cuts}):
        few = [cut for cut in cuts if cut.num_sources <= most]
        if len(few) < num_stages - 1:
            continue
        found = stream.balanced(few, num_stages)
        if best is None or found[0] < WORTH_IT * best[0]:
            best = found
        if best[0] <= UNEVEN * stream.num_bytes / num_stages:
            break
    assert best is not None
    return best[1]


@dataclass(frozen=True)
class Stream:
    """The calls that depend on token ids or on caches, in order, and what each reads besides."""

    program: Program
    calls: Sequence[fx.Node]
    reads: Mapping[fx.Node, frozenset[fx.Node]]
    """Node -> what it needs that is no such call: parameters, inputs, caches, sizes, and what they are computed with."""

    @classmethod
    def of(cls, program: Program) -> Stream:
        sources = {"input_ids", *program.caches}
        calls, reads = dict[fx.Node, None](), dict[fx.Node, frozenset[fx.Node]]()
        for node in program.graph.graph.nodes:
            besides = [source for source in node.all_input_nodes if source not in calls]
            reads[node] = frozenset(besides).union(*(reads[source] for source in besides))
            depends = len(besides) < len(node.all_input_nodes)
            if node.op == "call_function" and not isinstance(val(node), int | torch.SymInt):
                depends |= any(source.name in sources for source in besides)
            if node.op == "call_function" and depends:
                calls[node] = None
        return cls(program, list(calls), reads)

    @cached_property
    def tokens(self) -> Any:
        """T."""
        return val(_placeholder(self.program, "input_ids")).shape[1].node.expr

    def cuts(self) -> Iterator[Cut]:
        """Where the program can be cut: tensors with a row per token cross, and each cache stays on one side.

        Of places between which no parameter is read, the one that is crossed from the fewest calls.
        """
        group = list[Cut]()
        for cut in self._all_cuts():
            if group and any(self._parameters[node] for node in self.calls[group[-1].position : cut.position]):
                yield min(group, key=lambda cut: cut.num_sources)
                group.clear()
            group.append(cut)
        if group:
            yield min(group, key=lambda cut: cut.num_sources)

    def _all_cuts(self) -> Iterator[Cut]:
        place = {node: i for i, node in enumerate(self.calls)}
        last = {node: max((place.get(user, len(place)) for user in node.users), default=0) for node in self.calls}
        last_use = {source.name: i for node, i in place.items() for source in self.reads[node] if source.op == "placeholder"}
        crossing, in_use = list[fx.Node](), set[str]()
        for i, node in enumerate(self.calls):
            crossing = [value for value in crossing if last[value] >= i]
            in_use = {cache for cache in in_use if last_use[cache] >= i}
            if crossing and not in_use and all(map(self._can_cross, crossing)):
                yield Cut(i, tuple(crossing))
            crossing.append(node)
            in_use |= {source.name for source in self.reads[node]} & self.program.caches.keys()

    def _can_cross(self, node: fx.Node) -> bool:
        shape = self.shape(node) if isinstance(val(node), Tensor) else []
        return -1 in shape and all(isinstance(size, int) for size in shape)

    def shape(self, node: fx.Node) -> list[Any]:
        """Of a value, with -1 for T."""
        return [-1 if not isinstance(size, int) and size.node.expr == self.tokens else size for size in val(node).shape]

    def balanced(self, cuts: Sequence[Cut], num_stages: int) -> tuple[int, Sequence[Cut]]:
        """Those with which the stage of the most bytes has as few as possible, and how many."""
        bounds = [0, *(cut.position for cut in cuts), len(self.calls)]
        sizes = [list(self._sizes(bounds[i:])) for i in range(len(bounds))]
        best: dict[int, tuple[int, tuple[int, ...]]] = {0: (0, ())}  # bound -> (bytes of the largest stage before it, bounds)
        for _ in range(num_stages):
            best = {
                j: min((max(most, sizes[i][j - i - 1]), (*chosen, j)) for i, (most, chosen) in best.items() if i < j)
                for j in range(min(best) + 1, len(bounds))
            }
        most, chosen = best[len(bounds) - 1]
        return most, [cuts[j - 1] for j in chosen[:-1]]

    def _sizes(self, bounds: Sequence[int]) -> Iterator[int]:
        """Bytes of the parameters that are read from the first bound up to each later one."""
        found, total = set[str](), 0
        for first, stop in pairwise(bounds):
            read = set[str]().union(*(self._parameters[node] for node in self.calls[first:stop])) - found
            total += sum(map(self._num_bytes.__getitem__, read))
            found |= read
            yield total

    @cached_property
    def _parameters(self) -> dict[fx.Node, set[str]]:
        return {node: {str(source.target) for source in self.reads[node] if source.op == "get_attr"} for node in self.calls}

    @property
    def num_bytes(self) -> int:
        """Of all parameters."""
        return sum(self._num_bytes.values())

    @cached_property
    def _num_bytes(self) -> dict[str, int]:
        """Of each parameter, as it is stored."""
        plan, sizes = self.program.weights, dict[str, int]()
        for name in plan:
            form, tensor = plan.format_of(name), self.program.parameter(name)
            sizes[name] = tensor.nbytes if form is None else tensor.numel() * form.bits // 8
        return sizes


def _placeholder(program: Program, name: str) -> fx.Node:
    return next(node for node in program.graph.graph.nodes if node.op == "placeholder" and node.name == name)


def _stage(stream: Stream, before: Cut, after: Cut) -> Program:
    """The calls between two cuts."""
    program, own = stream.program, stream.calls[before.position : after.position]
    output = program.graph.graph.output_node()
    needed = {*own}.union(*map(stream.reads.__getitem__, own), () if after.crossing else stream.reads[output])
    caches = {name: spec for name, spec in program.caches.items() if _placeholder(program, name) in needed}
    graph, new = fx.Graph(), dict[fx.Node, fx.Node]()
    for node in program.graph.graph.nodes:
        if node in needed or node.name in program.inputs:
            new[node] = graph.node_copy(node, new.__getitem__)
        elif node in before.crossing:
            arguments = (new[_placeholder(program, "input_ids")], stream.shape(node), val(node).dtype)
            new[node] = graph.create_node("call_function", ops.receive.reference, arguments, name=f"received_{node.name}")
            new[node].meta["val"] = val(node)
    graph.output(new[after.crossing[-1]] if after.crossing else fx.map_arg(output.args[0], new.__getitem__))  # pyright: ignore
    read = {str(node.target) for node in graph.nodes if node.op == "get_attr"}
    weights = program.weights.without(set(program.weights) - read)
    module = fx.GraphModule({name: program.parameter(name) for name in weights}, graph)
    stage = replace(program, graph=module, caches=caches, weights=weights)
    _hand_on(stage, [new[node] for node in after.crossing])
    stage.check()
    return stage


def _hand_on(stage: Program, values: Sequence[fx.Node]) -> None:
    """What crosses the cut behind a stage is sent, and its output is nothing."""
    output, tokens = stage.graph.graph.output_node(), _placeholder(stage, "input_ids")
    for value in values:
        output.args = (insert_call(stage, output, ops.send.reference, value, tokens),)
