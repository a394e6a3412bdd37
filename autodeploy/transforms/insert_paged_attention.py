"""insert_paged_attention: attention over a whole sequence becomes attention over a paged cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import fx

from autodeploy import custom_ops as ops
from autodeploy.custom_ops.attention_backend import AttentionBackend, choose_backend
from autodeploy.program import Choice, Program
from autodeploy.specs import AttentionLayer, CacheSpec, Target, input_of_pool
from autodeploy.transforms.base import Effect, Transform
from autodeploy.transforms.rewrite import arguments, aten, calls, insert_cache, insert_call, insert_input, note_choice, val


@dataclass(frozen=True, kw_only=True)
class InsertPagedAttention(Transform):
    """Each attention call appends its keys and values to a cache of its own and reads every request's pages.

    Calls that share their keys and values (layers with shared KV) share the cache; only the first appends. Values that are the
    last part of the only head's keys are not stored again. Which backend serves a layer is noted as the provider of `attention`.

    before:  y = attention(q, k, v, sinks, scale, window, softcap)
    after:   kv_append(k, v, kv_cache_0, slot_mapping)
             y = paged_attention(q, kv_cache_0, page_table, cu_seqlens_q, seq_lens, sinks, scale, window, softcap, Dv)
    """

    name: ClassVar[str] = "insert_paged_attention"
    effect: ClassVar[Effect] = Effect.INPUTS

    def apply(self, program: Program, target: Target) -> int:
        nodes = calls(program, ops.attention)
        caches: dict[tuple[Any, Any, CacheSpec], fx.Node] = {}
        for node in nodes:
            layer = describe_layer(node)
            backend, against = choose_backend(layer, target)
            note_choice(program, "attention", Choice(backend.name, against))
            _lower(program, node, layer, backend, caches)
        return len(nodes)


def _lower(
    program: Program,
    node: fx.Node,
    layer: AttentionLayer,
    backend: AttentionBackend,
    caches: dict[tuple[Any, Any, CacheSpec], fx.Node],
) -> None:
    spec, lowered, call = backend.cache_spec(layer), backend.lower(layer), arguments(node)
    slot_mapping = insert_input(program, input_of_pool("slot_mapping", spec.pool))
    where = [insert_input(program, input_of_pool("page_table", spec.pool))]
    where += [insert_input(program, name) for name in ("cu_seqlens_q", "seq_lens")]
    if (key := (call["k"], call["v"], spec)) not in caches:
        caches[key] = insert_cache(program, "kv_cache", spec)
        stored = None if layer.is_latent else call["v"]
        insert_call(program, node, lowered.append, call["k"], stored, caches[key], slot_mapping)
    settings = [call[name] for name in ("sinks", "scale", "window", "softcap")]
    tail = [call["chunk"], call["alibi"]] if call["chunk"] or call["alibi"] is not None else []
    paged = insert_call(program, node, lowered.attend, call["q"], caches[key], *where, *settings, layer.head_dim_v, *tail)
    node.replace_all_uses_with(paged)


def describe_layer(node: fx.Node) -> AttentionLayer:
    """Of an `attention` call."""
    call = arguments(node)
    q, k, v = (val(call[name]) for name in ("q", "k", "v"))
    return AttentionLayer(
        num_heads=q.shape[1],
        num_kv_heads=v.shape[1],
        head_dim_k=q.shape[3],
        head_dim_v=v.shape[3],
        dtype=str(k.dtype).removeprefix("torch."),
        scale=call["scale"],
        window=call["window"],
        softcap=call["softcap"],
        chunk=call["chunk"],
        has_sinks=call["sinks"] is not None,
        has_alibi=call["alibi"] is not None,
        is_latent=_is_last_part(call["v"], call["k"]) and not (call["window"] or call["chunk"]),
    )


def _is_last_part(v: fx.Node, k: fx.Node) -> bool:
    """One head's keys are its values, or a cat along the head dim that ends with them."""
    if k is v:
        return val(v).shape[1] == 1
    if k.target is not aten.cat.default:
        return False
    parts: Any = k.args[0]
    dim = k.args[1] if len(k.args) > 1 else 0
    return parts[-1] is v and dim in (-1, 3) and val(v).shape[1] == 1
