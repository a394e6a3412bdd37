"""Attention: one op over a whole sequence as captured, two over the paged cache as served."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from autodeploy.custom_ops.op import semantic_op
from autodeploy.custom_ops.pointwise import rms_norm, rope
from autodeploy.specs import SCALE_BYTES, SCALED_DTYPES

SCALED = {getattr(torch, name) for name in SCALED_DTYPES}
QUERY_BLOCK = 128
"""Query rows per score matrix; the later blocks of a long prompt see more keys than the earlier ones."""


def _attention_fake(q: Tensor, k: Tensor, v: Tensor, *_: object) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3])


@semantic_op(fake=_attention_fake)
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    scale: float,
    window: int,
    softcap: float,
    mask: int,
    chunk: int = 0,
    alibi: Tensor | None = None,
) -> Tensor:
    """Causal attention over one sequence.

    q [1, H, T, Dk], k [1, Hkv, T, Dk], v [1, Hkv, T, Dv], sinks [H] or None -> [1, T, H, Dv].
    window: keys a query sees, itself included (0: all). chunk: a query sees keys of its own chunk of that many positions
    (0: all). softcap: 0 is off. alibi [H]: a score gains slope * (key position - query position). mask: which captured mask
    this call was given (an index into the capture's list until `capture` has proved what it is, then -1).
    """
    return attend(q[0], k[0], v[0], 0, sinks, scale, Visible(window, chunk), softcap, alibi)[None]


@semantic_op(mutates=["cache"], fake=lambda k, v, cache, slot_mapping: None)
def kv_append(k: Tensor, v: Tensor | None, cache: Tensor, slot_mapping: Tensor) -> None:
    """Write keys [1, Hkv, T, Dk] and values [1, Hkv, T, Dv] to `slot_mapping` [T] of cache [pages, page, Hkv, Dk + Dv].

    Without values the cache is [pages, page, Hkv, Dk]: they are the last part of the keys (a latent cache). A cache of 8 bits
    has 8 bytes more behind the numbers of a head: what its key's and its value's are multiples of, each a float32.
    """
    parts = [x[0].transpose(0, 1) for x in ([k] if v is None else [k, v])]
    rows = scaled_rows(parts, cache.dtype) if cache.dtype in SCALED else torch.cat(parts, -1)
    slots, rows = (x.view(torch.uint8) if cache.dtype in SCALED else x for x in (cache.flatten(0, 1), rows))
    slots.index_copy_(0, slot_mapping, rows)


def scaled_rows(parts: list[Tensor], dtype: torch.dtype) -> Tensor:
    """Keys, and values if they are not part of them, as a cache of 8 bits keeps them: [.., D] each -> [.., C]."""
    numbers, scales = zip(*(_scaled(part.float(), dtype) for part in parts), strict=True)
    both = torch.cat([scales[0], scales[-1]], -1)
    return torch.cat([part.view(torch.uint8) for part in (*numbers, both)], -1).view(dtype)


def _scaled(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Numbers of a dtype, and their scale, over the last dim: the nearest multiples of the largest one's."""
    largest = 127 if dtype == torch.int8 else torch.finfo(dtype).max
    scale = x.abs().amax(-1, keepdim=True) / largest
    ratio = x / torch.where(scale > 0, scale, 1)
    return (ratio.round() if dtype == torch.int8 else ratio).to(dtype), scale


def unscaled(rows: Tensor, head_dim_k: int, head_dim_v: int) -> tuple[Tensor, Tensor]:
    """Keys [.., Dk] and values [.., Dv] in float32 of rows [.., C] of a cache of 8 bits."""
    numbers, scales = rows.split([rows.shape[-1] - SCALE_BYTES, SCALE_BYTES], -1)
    numbers, scales = numbers.float(), scales.contiguous().view(torch.float32)
    return numbers[..., :head_dim_k] * scales[..., :1], numbers[..., -head_dim_v:] * scales[..., 1:]


@semantic_op(mutates=["cache"], fake=lambda q, *_: torch.empty_like(q))
def rope_append(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cache: Tensor,
    slot_mapping: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = -1.0,
    offset: float = 0.0,
    weight_in_float: bool = False,
) -> Tensor:
    """`rope` of queries [1, H, T, D] and keys [1, Hkv, T, D], and `kv_append` of the latter; gives the queries.

    With an eps of 0 and more, both are first normed over D (`rms_norm`, each with its weight [D] or None).
    """
    if eps >= 0:
        q, k = (rms_norm.reference(x, w, eps, offset, weight_in_float) for x, w in ((q, q_weight), (k, k_weight)))
    kv_append.reference(rope.reference(k, cos, sin, interleaved), v, cache, slot_mapping)
    return rope.reference(q, cos, sin, interleaved)


def _paged_attention_fake(q: Tensor, *args: Any) -> Tensor:
    head_dim_v = args[8]
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], head_dim_v)


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
    head_dim_v: int,
    chunk: int = 0,
    alibi: Tensor | None = None,
) -> Tensor:
    """Each request's queries over its own pages; query i of n new ones stands at position seq_len - n + i.

    q [1, H, T, Dk], cache [pages, page, Hkv, C], page_table [B, P], cu_seqlens_q [B + 1], seq_lens [B] -> [1, T, H, Dv].
    Keys are the first Dk of C, values the last `head_dim_v` (before the scales of a cache of 8 bits); the two overlap in a
    latent cache. Pages behind what every query sees are not read.
    """
    head_dim_k, page_size = q.shape[3], cache.shape[1]
    visible = Visible(window, chunk)
    out = q.new_empty(1, q.shape[2], q.shape[1], head_dim_v)
    bounds = cu_seqlens_q.tolist()
    for i, seq_len in enumerate(seq_lens.tolist()):
        start, stop = bounds[i], bounds[i + 1]
        offset = seq_len - (stop - start)
        first_page = visible.first_key(offset) // page_size
        pages = page_table[i, first_page : -(-seq_len // page_size)]
        first = first_page * page_size
        kv = _pages(cache, pages).flatten(0, 1)[: seq_len - first].transpose(0, 1)
        k, v = kv[..., :head_dim_k], kv[..., -head_dim_v:]
        if cache.dtype in SCALED:
            k, v = (x.to(q.dtype) for x in unscaled(kv, head_dim_k, head_dim_v))
        queries = q[0, :, start:stop]
        out[0, start:stop] = attend(queries, k, v, offset, sinks, scale, visible, softcap, alibi, first)
    return out


def _pages(cache: Tensor, pages: Tensor) -> Tensor:
    """Those pages of it."""
    if cache.dtype not in SCALED:
        return cache.index_select(0, pages)
    return cache.view(torch.uint8).index_select(0, pages).view(cache.dtype)  # torch selects no floats of 8 bits


@dataclass(frozen=True)
class Visible:
    """Which keys a query sees: those before it and itself, within a window, within its chunk (0 is no limit)."""

    window: int = 0
    chunk: int = 0

    def first_key(self, query: int) -> int:
        """Position of the first key that a query at that position sees."""
        first = max(0, query - self.window + 1) if self.window else 0
        return max(first, query // self.chunk * self.chunk) if self.chunk else first

    def mask(self, query: Tensor, key: Tensor) -> Tensor:
        """[queries, keys] for positions query [queries, 1] and key [1, keys]."""
        seen = key <= query
        if self.window:
            seen = seen & (key > query - self.window)
        return seen & (key // self.chunk == query // self.chunk) if self.chunk else seen


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offset: int,
    sinks: Tensor | None,
    scale: float,
    visible: Visible,
    softcap: float = 0.0,
    alibi: Tensor | None = None,
    first: int = 0,
) -> Tensor:
    """q [H, S, Dk] at positions offset.. over k [Hkv, L, Dk], v [Hkv, L, Dv] at positions first.. -> [S, H, Dv].

    The query heads of a group are folded into rows, so that keys and values are read once per group. Softmax is in float32 or
    better.
    """
    num_heads, num_queries, _ = q.shape
    num_kv_heads, head_dim_v = k.shape[0], v.shape[2]
    group = num_heads // num_kv_heads
    grouped = q.reshape(num_kv_heads, group, num_queries, -1)
    is_plain = sinks is None and alibi is None and not softcap
    if num_queries == 1 and is_plain:  # every key is seen: no mask, and no copy of strided keys
        seen = slice(visible.first_key(offset) - first, offset + 1 - first)
        out = F.scaled_dot_product_attention(grouped[None, :, :, 0], k[None, :, seen], v[None, :, seen], scale=scale)
        return out.flatten(0, 2)[None]
    k, v = k.contiguous(), v.contiguous()
    per_head = (num_kv_heads, group, 1, 1)
    sink_column, slopes = (None if values is None else values.reshape(per_head) for values in (sinks, alibi))
    out = q.new_empty(num_queries, num_kv_heads, group, head_dim_v)
    for start in range(0, num_queries, QUERY_BLOCK):
        stop = min(start + QUERY_BLOCK, num_queries)
        low, high = visible.first_key(offset + start), offset + stop
        keys = slice(low - first, high - first)
        query, key = _positions(offset + start, high, q.device)[:, None], _positions(low, high, q.device)[None]
        rows = grouped[:, :, start:stop].flatten(1, 2)
        scores = torch.bmm(rows, k[:, keys].transpose(1, 2)).unflatten(1, (group, stop - start)) * scale
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        if slopes is not None:
            scores = scores + slopes * (key - query)
        if stop - start > 1:
            scores = scores.masked_fill(~visible.mask(query, key), float("-inf"))
        weights = _softmax(scores, sink_column).to(v.dtype).flatten(1, 2)
        block = torch.bmm(weights, v[:, keys]).unflatten(1, (group, stop - start))
        out[start:stop] = block.permute(2, 0, 1, 3)
    return out.flatten(1, 2)


def _positions(start: int, stop: int, device: torch.device) -> Tensor:
    return torch.arange(start, stop, device=device)


def _softmax(scores: Tensor, sinks: Tensor | None) -> Tensor:
    """Over the last dim; a sink is one more score per head that takes weight and gives no value."""
    dtype = torch.promote_types(scores.dtype, torch.float32)
    if sinks is None:
        return torch.softmax(scores, dim=-1, dtype=dtype)
    column = sinks.to(dtype).expand(*scores.shape[:-1], 1)
    return torch.softmax(torch.cat([scores.to(dtype), column], dim=-1), dim=-1)[..., :-1]
