"""gather_logits: only the tokens whose logits are wanted go through what lies behind the last op that mixes tokens."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from autodeploy import custom_ops as ops
from autodeploy.program import Program
from autodeploy.specs import Target
from autodeploy.transforms.base import Effect, Transform
from autodeploy.transforms.rewrite import arguments, aten, evaluate_node, insert_call, insert_input, val

PER_TOKEN = {
    aten.linear.default,
    aten.to.dtype,
    aten.contiguous.default,
    ops.rms_norm.overload,
    ops.layer_norm.overload,
    ops.add_rms_norm.overload,
    ops.gated_activation.overload,
    ops.all_gather.overload,
    ops.all_reduce.overload,
    operator.getitem,
}
"""Ops that do the same for each token, beside pointwise ones and splits of the last dim."""


@dataclass(frozen=True, kw_only=True)
class GatherLogits(Transform):
    """Select the wanted rows of everything that the logits are computed from token by token: behind the last attention.

    before:  h = a + linear(x); logits = linear(rms_norm(h + mlp(h), ...), lm_head)       a, x [1, T, C]; logits [1, T, V]
    after:   the same of index_select(a, 1, logits_indices) and index_select(x, 1, logits_indices); logits [1, N, V]
    """

    name: ClassVar[str] = "gather_logits"
    effect: ClassVar[Effect] = Effect.INPUTS

    def apply(self, program: Program, target: Target) -> int:
        if "logits_indices" in program.inputs:
            return 0
        behind = _per_token(program.graph.graph)
        crossing = {source: reader for reader in reversed(behind) for source in _dependent(reader) if source not in behind}
        if not crossing or not all(map(_is_stream, map(val, crossing))):
            return 0
        rows = insert_input(program, "logits_indices")
        for source, first_reader in crossing.items():
            selected = insert_call(program, first_reader, aten.index_select.default, source, 1, rows)
            for reader in behind:
                reader.replace_input_with(source, selected)
        for node in behind[:-1]:
            evaluate_node(program, node)
        return len(crossing)


def _per_token(graph: fx.Graph) -> list[fx.Node]:
    """The output and the calls, in order, that it needs, that nothing else needs, and that do the same for each token."""
    behind = {graph.output_node()}
    for node in reversed(graph.nodes):
        if node.users and behind.issuperset(node.users) and _does_the_same_for_each_token(node):
            behind.add(node)
    parts = {node for node in behind if node.target is operator.getitem and node.args[0] not in behind}
    return [node for node in graph.nodes if node in behind - parts]


def _does_the_same_for_each_token(node: fx.Node) -> bool:
    if node.op != "call_function":
        return False
    if node.target is aten.split_with_sizes.default:
        known = arguments(node)["dim"] in (-1, 2)
    else:
        known = node.target in PER_TOKEN or torch.Tag.pointwise in getattr(node.target, "tags", ())
    return known and all(_is_stream(val(each)) for each in (node, *_dependent(node))) and any(_dependent(node))


def _dependent(node: fx.Node) -> Iterator[fx.Node]:
    """Its inputs whose sizes depend on the number of tokens, or that are such a number."""
    return (each for each in node.all_input_nodes if any(not isinstance(size, int) for size in _sizes(val(each))))


def _sizes(value: Any) -> Iterator[Any]:
    if isinstance(value, list | tuple):
        for each in value:
            yield from _sizes(each)
    elif isinstance(value, torch.Tensor):
        yield from value.shape
    elif isinstance(value, torch.SymInt):
        yield value


def _is_stream(value: Any) -> bool:
    """Of shape [1, T, C], or several of such."""
    if isinstance(value, list | tuple):
        return all(map(_is_stream, value))
    return isinstance(value, torch.Tensor) and [isinstance(size, int) for size in value.shape] == [True, False, True]
