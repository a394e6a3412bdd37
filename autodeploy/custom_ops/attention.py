"""Attention: one op over a whole sequence as captured, two over the paged cache as served."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from autodeploy.custom_ops.op import semantic_op

QUERY_BLOCK = 128
"""Query rows per score matrix; the later blocks of a long prompt see more keys than the earlier ones."""


def _attention_fake(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, scale: float, window: int, softcap: float, mask: int
) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3])


@semantic_op(fake=_attention_fake)
def attention(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, scale: float, window: int, softcap: float, mask: int
) -> Tensor:
    """Causal attention over one sequence.

    q [1, H, T, Dk], k [1, Hkv, T, Dk], v [1, Hkv, T, Dv], sinks [H] or None -> [1, T, H, Dv].
    window: keys a query sees, itself included (0: all). softcap: 0 is off. mask: which captured mask this call was given
    (an index into the capture's list until `capture` has proved what it is, then -1).
    """
    return attend(q[0], k[0], v[0], 0, sinks, scale, window, softcap)[None]


@semantic_op(mutates=["cache"], fake=lambda k, v, cache, slot_mapping: None)
def kv_append(k: Tensor, v: Tensor, cache: Tensor, slot_mapping: Tensor) -> None:
    """Write keys [1, Hkv, T, Dk] and values [1, Hkv, T, Dv] to `slot_mapping` [T] of cache [pages, page, Hkv, Dk + Dv]."""
    slots = cache.flatten(0, 1)
    head_dim_k = k.shape[3]
    slots[:, :, :head_dim_k].index_copy_(0, slot_mapping, k[0].transpose(0, 1))
    slots[:, :, head_dim_k:].index_copy_(0, slot_mapping, v[0].transpose(0, 1))


def _paged_attention_fake(q: Tensor, cache: Tensor, *args: object) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], cache.shape[3] - q.shape[3])


@semantic_op(fake=_paged_attention_fake)
def paged_attention(
    q: Tensor,
    cache: Tensor,
    page_table: Tensor,
    cu_seqlens_q: Tensor,
    seq_lens: Tensor,
    sinks: Tensor | None,
    scale: float,
    window: int,
    softcap: float,
) -> Tensor:
    """Each request's queries over its own pages; query i of n new ones stands at position seq_len - n + i.

    q [1, H, T, Dk], cache [pages, page, Hkv, Dk + Dv], page_table [B, P], cu_seqlens_q [B + 1], seq_lens [B] -> [1, T, H, Dv].
    Pages that lie behind the window of every query are not read.
    """
    head_dim_k, page_size = q.shape[3], cache.shape[1]
    out = q.new_empty(1, q.shape[2], q.shape[1], cache.shape[3] - head_dim_k)
    bounds = cu_seqlens_q.tolist()
    for i, seq_len in enumerate(seq_lens.tolist()):
        start, stop = bounds[i], bounds[i + 1]
        offset = seq_len - (stop - start)
        first_page = max(0, offset - window + 1) // page_size if window else 0
        pages = page_table[i, first_page : -(-seq_len // page_size)]
        kv = cache.index_select(0, pages).flatten(0, 1)[: seq_len - first_page * page_size].transpose(0, 1)
        k, v = kv[..., :head_dim_k], kv[..., head_dim_k:]
        out[0, start:stop] = attend(q[0, :, start:stop], k, v, offset - first_page * page_size, sinks, scale, window, softcap)
    return out


def attend(
    q: Tensor, k: Tensor, v: Tensor, offset: int, sinks: Tensor | None, scale: float, window: int, softcap: float
) -> Tensor:
    """q [H, S, Dk] at positions offset.. over k [Hkv, L, Dk], v [Hkv, L, Dv] at positions 0.. -> [S, H, Dv].

    The query heads of a group are folded into rows, so that keys and values are read once per group. Softmax is in float32 or
    better.
    """
    num_heads, num_queries, _ = q.shape
    num_kv_heads, head_dim_v = k.shape[0], v.shape[2]
    group = num_heads // num_kv_heads
    grouped = q.reshape(num_kv_heads, group, num_queries, -1)
    if num_queries == 1 and sinks is None and not softcap:  # every key is seen: no mask, and no copy of strided keys
        seen = slice(max(0, offset - window + 1) if window else 0, offset + 1)
        out = F.scaled_dot_product_attention(grouped[None, :, :, 0], k[None, :, seen], v[None, :, seen], scale=scale)
        return out.flatten(0, 2)[None]
    k, v = k.contiguous(), v.contiguous()
    sink_column = None if sinks is None else sinks.reshape(num_kv_heads, group, 1, 1)
    out = q.new_empty(num_queries, num_kv_heads, group, head_dim_v)
    for start in range(0, num_queries, QUERY_BLOCK):
        stop = min(start + QUERY_BLOCK, num_queries)
        low, high = max(0, offset + start - window + 1) if window else 0, offset + stop
        rows = grouped[:, :, start:stop].flatten(1, 2)
        scores = torch.bmm(rows, k[:, low:high].transpose(1, 2)).unflatten(1, (group, stop - start)) * scale
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        if stop - start > 1:
            scores = scores.masked_fill(~_visible(offset + start, offset + stop, low, high, window, q.device), float("-inf"))
        weights = _softmax(scores, sink_column).to(v.dtype).flatten(1, 2)
        block = torch.bmm(weights, v[:, low:high]).unflatten(1, (group, stop - start))
        out[start:stop] = block.permute(2, 0, 1, 3)
    return out.flatten(1, 2)


def _visible(start: int, stop: int, low: int, high: int, window: int, device: torch.device) -> Tensor:
    """[stop - start, high - low]: may the query at a position see the key at a position."""
    query = torch.arange(start, stop, device=device)[:, None]
    key = torch.arange(low, high, device=device)[None, :]
    return (key <= query) & (key > query - window) if window else key <= query


def _softmax(scores: Tensor, sinks: Tensor | None) -> Tensor:
    """Over the last dim; a sink is one more score per head that takes weight and gives no value."""
    dtype = torch.promote_types(scores.dtype, torch.float32)
    if sinks is None:
        return torch.softmax(scores, dim=-1, dtype=dtype)
    column = sinks.to(dtype).expand(*scores.shape[:-1], 1)
    return torch.softmax(torch.cat([scores.to(dtype), column], dim=-1), dim=-1)[..., :-1]
