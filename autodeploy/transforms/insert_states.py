"""insert_states: recurrent ops over a whole sequence go on from the state of each request."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from autodeploy.custom_ops.recurrent import RECURRENT_OPS
from autodeploy.program import Program
from autodeploy.specs import Target
from autodeploy.transforms.base import Effect, Transform
from autodeploy.transforms.rewrite import arguments, insert_cache, insert_call, insert_input, val


@dataclass(frozen=True, kw_only=True)
class InsertStates(Transform):
    """Each recurrent op gets a cache with one slot per running request.

    before:  y = causal_conv1d(x, weight, bias, "silu")
    after:   y = causal_conv1d_cached(x, weight, bias, "silu", state_0, state_slots, cu_seqlens_q, seq_lens)
    """

    name: ClassVar[str] = "insert_states"
    effect: ClassVar[Effect] = Effect.INPUTS

    def apply(self, program: Program, target: Target) -> int:
        nodes = [node for node in program.graph.graph.nodes if node.target in RECURRENT_OPS]
        for node in nodes:
            op, args = RECURRENT_OPS[node.target], list(arguments(node).values())
            where = [insert_input(program, name) for name in ("state_slots", "cu_seqlens_q", "seq_lens")]
            cache = insert_cache(program, "state", op.cache_spec(*map(val, args)))
            cached = insert_call(program, node, op.cached, *args, cache, *where)
            node.replace_all_uses_with(cached)
        return len(nodes)
