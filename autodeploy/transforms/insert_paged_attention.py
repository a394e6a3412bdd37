"""insert_paged_attention: attention over a whole sequence becomes attention over a paged cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from autodeploy import custom_ops as ops
from autodeploy.program import Program
from autodeploy.specs import EXAMPLE_PAGE_SIZE, EXAMPLE_PAGES, AttentionLayer, CacheSpec, PagedKV, SlidingWindowKV, Target
from autodeploy.transforms.base import Effect, Transform
from autodeploy.transforms.rewrite import calls, fake_mode, insert_call, insert_input, val

PAGED_INPUTS = ("slot_mapping", "page_table", "cu_seqlens_q", "seq_lens")


@dataclass(frozen=True, kw_only=True)
class InsertPagedAttention(Transform):
    """Each attention call appends its keys and values to a cache of its own and reads every request's pages.

    Calls that share their keys and values (layers with shared KV) share the cache; only the first appends.

    before:  y = attention(q, k, v, sinks, scale, window, softcap)
    after:   kv_append(k, v, kv_cache_0, slot_mapping)
             y = paged_attention(q, kv_cache_0, page_table, cu_seqlens_q, seq_lens, sinks, scale, window, softcap)
    """

    name: ClassVar[str] = "insert_paged_attention"
    effect: ClassVar[Effect] = Effect.INPUTS

    def apply(self, program: Program, target: Target) -> int:
        nodes = calls(program, ops.attention)
        if not nodes:
            return 0
        slot_mapping, *where = [insert_input(program, name) for name in PAGED_INPUTS]
        caches: dict[tuple[Any, Any], fx.Node] = {}
        for node in nodes:
            q, k, v, sinks, scale, window, softcap, _ = node.args
            if (k, v) not in caches:
                caches[k, v] = _insert_cache(program, _cache_spec(_describe(node)))
                insert_call(program, node, ops.kv_append, k, v, caches[k, v], slot_mapping)
            paged = insert_call(program, node, ops.paged_attention, q, caches[k, v], *where, sinks, scale, window, softcap)
            node.replace_all_uses_with(paged)
        return len(nodes)


def _describe(node: fx.Node) -> AttentionLayer:
    args: Any = node.args
    q, k, v, sinks, scale, window, softcap, _ = args
    (_, num_heads, _, head_dim_k), (_, num_kv_heads, _, head_dim_v) = val(q).shape, val(v).shape
    dtype = str(val(k).dtype).removeprefix("torch.")
    return AttentionLayer(
        num_heads,
        num_kv_heads,
        head_dim_k,
        head_dim_v,
        dtype,
        scale,
        window,
        softcap,
        sinks is not None,  # pyright: ignore
    )


def _cache_spec(layer: AttentionLayer) -> CacheSpec:
    shape = (layer.num_kv_heads, layer.head_dim_k, layer.head_dim_v, layer.dtype)
    return SlidingWindowKV(*shape, window=layer.window) if layer.window else PagedKV(*shape)


def _insert_cache(program: Program, spec: CacheSpec) -> fx.Node:
    graph = program.graph.graph
    name = f"kv_cache_{len(program.caches)}"
    with graph.inserting_after([node for node in graph.nodes if node.op == "placeholder"][-1]):
        node = graph.placeholder(name)
    with fake_mode(program):
        node.meta["val"] = torch.empty(spec.shape(EXAMPLE_PAGES, EXAMPLE_PAGE_SIZE), dtype=getattr(torch, spec.dtype))
    program.caches[name] = spec
    return node
