"""fuse_rope_append: what happens to queries and keys between their projection and the cache becomes one op."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import fx

from autodeploy import custom_ops as ops
from autodeploy.program import Program, is_semantic
from autodeploy.specs import Target
from autodeploy.transforms.base import Effect, Transform
from autodeploy.transforms.rewrite import Bindings, Call, Var, arguments, aten, calls, erase_unused, insert_call, match, val

COS_SIN = (Var("cos"), Var("sin"), Var("interleaved"))
NORM = (Var("eps"), Var("offset"), Var("weight_in_float"))
ROTATED = Call(ops.rope, Var("x"), *COS_SIN)
NORMED = Call(ops.rope, Call(aten.transpose.int, Call(ops.rms_norm, Var("x"), Var("weight"), *NORM), 1, 2), *COS_SIN)


@dataclass(frozen=True, kw_only=True)
class FuseRopeAppend(Transform):
    """Rotary embedding of queries and keys, the norm of each head before it, and the write of the keys to their cache.

    before:  q_1 = rope(q, cos, sin, False); k_1 = rope(k, cos, sin, False); kv_append(k_1, v, kv_cache_0, slot_mapping)
    after:   q_1 = rope_append(q, k, v, kv_cache_0, slot_mapping, cos, sin, False)
    """

    name: ClassVar[str] = "fuse_rope_append"
    effect: ClassVar[Effect] = Effect.FUSION

    def apply(self, program: Program, target: Target) -> int:
        return sum(_fuse(program, append) for append in calls(program, ops.kv_append))


def _fuse(program: Program, append: fx.Node) -> bool:
    """Whether the keys and the queries of the first attention over that cache are rotated alike, for nobody else."""
    call = arguments(append)
    k, v, cache = call["k"], call["v"], call["cache"]
    readers = [node for node in cache.users if is_semantic(node, "paged_attention")]
    q = arguments(readers[0])["q"] if readers else None
    if q is None or v is None or q > append or len(k.users) > 1:
        return False
    for pattern in (NORMED, ROTATED):
        for ours, theirs in zip(match(pattern, q), match(pattern, k), strict=False):
            if _rest(ours) == _rest(theirs) and val(ours["x"]).dim() == 4:
                _replace(program, append, q, k, (ours, theirs))
                return True
    return False


def _rest(bindings: Bindings) -> Bindings:
    return {name: value for name, value in bindings.items() if name not in ("x", "weight")}


def _replace(program: Program, append: fx.Node, q: Any, k: Any, found: tuple[Bindings, Bindings]) -> None:
    call, (ours, theirs) = arguments(append), found
    rotation = [ours[name] for name in ("cos", "sin", "interleaved")]
    heads, norm = [m["x"] for m in found], list[Any]()
    if "eps" in ours:
        heads = [insert_call(program, append, aten.transpose.int, x, 1, 2) for x in heads]
        norm = [ours["weight"], theirs["weight"], *(ours[name] for name in ("eps", "offset", "weight_in_float"))]
    stored = [call[name] for name in ("v", "cache", "slot_mapping")]
    both = insert_call(program, append, ops.rope_append, *heads, *stored, *rotation, *norm)
    append.graph.erase_node(append)
    q.replace_all_uses_with(both)
    erase_unused(q, k)
