"""gather_logits: only the tokens whose logits are wanted go through the head of the model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from autodeploy import custom_ops as ops
from autodeploy.program import Program
from autodeploy.specs import Target
from autodeploy.transforms.base import Effect, Transform
from autodeploy.transforms.rewrite import aten, evaluate_node, insert_call, insert_input, val

HEAD = {aten.linear.default, ops.rms_norm.overload, ops.layer_norm.overload, ops.all_gather.overload}
"""Ops over the last dim that may stand between the last layer and the logits, beside pointwise ones."""


@dataclass(frozen=True, kw_only=True)
class GatherLogits(Transform):
    """Select the wanted rows at the last point where the model is still one stream of tokens.

    before:  logits = linear(rms_norm(hidden, ...), lm_head)                                        [1, T, V]
    after:   logits = linear(rms_norm(index_select(hidden, 1, logits_indices), ...), lm_head)       [1, N, V]
    """

    name: ClassVar[str] = "gather_logits"
    effect: ClassVar[Effect] = Effect.INPUTS

    def apply(self, program: Program, target: Target) -> int:
        if "logits_indices" in program.inputs:
            return 0
        graph = program.graph.graph
        output = graph.output_node()
        tail = _tail(output.args[0]) or [output]
        stream = _stream_input(tail[-1])
        if stream is None:
            return 0
        rows = insert_input(program, "logits_indices")
        selected = insert_call(program, tail[-1], aten.index_select.default, stream, 1, rows)
        tail[-1].replace_input_with(stream, selected)
        if tail == [output]:
            return 1
        for node in reversed(tail):
            evaluate_node(program, node)
        return 1


def _tail(node: Any) -> list[fx.Node]:
    """From the logits back: nodes that handle each token of [1, T, ...] by itself and have one token-dependent input."""
    tail: list[fx.Node] = []
    while isinstance(node, fx.Node) and node.op == "call_function" and _keeps_tokens(node):
        if len(node.users) > 1 or (stream := _stream_input(node)) is None:
            break
        tail.append(node)
        node = stream
    return tail


def _keeps_tokens(node: fx.Node) -> bool:
    pointwise = isinstance(node.target, torch._ops.OpOverload) and torch.Tag.pointwise in node.target.tags
    return node.target in HEAD or pointwise or node.target in (aten.to.dtype, aten.contiguous.default)


def _stream_input(node: fx.Node) -> fx.Node | None:
    """The one input of shape [1, T, C]; None when there are several or another one depends on T."""
    streams = [arg for arg in node.all_input_nodes if isinstance(val(arg), torch.Tensor) and _depends_on_tokens(val(arg))]
    return streams[0] if len(streams) == 1 and val(streams[0]).dim() == 3 else None


def _depends_on_tokens(value: torch.Tensor) -> bool:
    return any(not isinstance(size, int) for size in value.shape)
