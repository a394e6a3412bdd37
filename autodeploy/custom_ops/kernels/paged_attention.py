"""Attention of new tokens over paged keys and values: a program takes rows (tokens times query heads of a group) of a request.

While every request decodes, its keys are split between programs, whose results a second kernel merges. Sums are in float32.
"""

import triton
import triton.language as tl

from autodeploy.custom_ops.gpu import Variant

SCALE_BYTES = tl.constexpr(8)
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def request_of(block, cu_seqlens_q, requests, group, BLOCK_ROWS: tl.constexpr):
    """The request that a block of rows belongs to: the last one whose first block (a bound on those before it) is not behind."""
    low, high = 0, requests
    while high - low > 1:
        middle = (low + high) // 2
        if tl.load(cu_seqlens_q + middle) * group // BLOCK_ROWS + middle <= block:
            low = middle
        else:
            high = middle
    return low


@triton.jit
def scales_of(rows, width, mask, WHICH: tl.constexpr):
    """Of the keys (0) or values (1) at these rows of the cache."""
    return tl.load((rows + width - SCALE_BYTES).to(tl.pointer_type(tl.float32)) + WHICH, mask, 0.0)


@triton.jit
def product(a, b):
    """a @ b in float32; of floats, no fewer digits are used."""
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def attention_rows(
    q, cache, page_table, cu_seqlens_q, seq_lens, sinks, alibi, out, values, weights,
    requests, kv_heads, group, key_width, value_width, width, page_size, split, splits,
    q_head_stride, q_token_stride, table_stride, scale, window, softcap, chunk,
    DECODES: tl.constexpr, IS_SPLIT: tl.constexpr, IS_LATENT: tl.constexpr, SCALED: tl.constexpr, HAS_SINKS: tl.constexpr,
    HAS_ALIBI: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_HEAD: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_KEYS: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Grid: blocks of rows (a bound), heads of the cache, splits.

    Keys are the first `key_width` numbers of a row of the cache; latent ones go on with the values. `values` [T, H, splits, Dv]
    and `weights` [T, H, splits, 2] (largest score, sum) are a split's, to be merged.
    """
    block, kv_head, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if DECODES:
        blocks = tl.cdiv(group, BLOCK_ROWS)
        request, first_row = block // blocks, block % blocks * BLOCK_ROWS
        start = tl.load(cu_seqlens_q + request)
    else:
        request = request_of(block, cu_seqlens_q, requests, group, BLOCK_ROWS)
        start = tl.load(cu_seqlens_q + request)
        first_row = (block - (start * group // BLOCK_ROWS + request)) * BLOCK_ROWS
    new = tl.load(cu_seqlens_q + request + 1) - start
    seq_len = tl.load(seq_lens + request)
    row = first_row + tl.arange(0, BLOCK_ROWS)
    is_row = row < new * group
    within, head = tl.minimum(row // group, new - 1), kv_head * group + row % group
    position = seq_len - new + within
    first_seen = tl.zeros_like(position)
    if window > 0:
        first_seen = tl.maximum(position - window + 1, 0)
    if chunk > 0:
        first_seen = tl.maximum(first_seen, position // chunk * chunk)
    low = tl.maximum(tl.min(first_seen, 0), part * split)
    high = tl.minimum(tl.max(position, 0) + 1, (part + 1) * split)
    high = tl.where(first_row < new * group, high, low)  # blocks beyond a request's rows have nothing to do

    heads = kv_heads * group
    d, e = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V)
    token = (start + within).to(tl.int64)
    queries = q + token * q_token_stride + head * q_head_stride
    query = tl.load(queries[:, None] + d[None, :], is_row[:, None] & (d[None, :] < key_width), 0.0)
    if IS_LATENT:
        latent = tl.load(queries[:, None] + key_width + e[None, :], is_row[:, None] & (e[None, :] < value_width), 0.0)
    if HAS_ALIBI:
        slope = tl.load(alibi + head, is_row, 0.0).to(tl.float32)

    top = tl.full((BLOCK_ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_ROWS,), tl.float32)
    sums = tl.zeros((BLOCK_ROWS, BLOCK_V), tl.float32)
    for step in range(tl.cdiv(high - low, BLOCK_KEYS)):  # from 0: a loop from low on is not pipelined while decoding
        key = low + step * BLOCK_KEYS + tl.arange(0, BLOCK_KEYS)
        there = (key >= low) & (key < high)
        page = tl.load(page_table + request.to(tl.int64) * table_stride + key // page_size, there, 0)
        rows = cache + ((page * page_size + key % page_size) * kv_heads + kv_head) * width
        value_at = rows[:, None] + key_width + e[None, :]
        value = tl.load(value_at, there[:, None] & (e[None, :] < value_width), 0.0).to(query.dtype)
        score = tl.zeros((BLOCK_ROWS, BLOCK_KEYS), tl.float32)
        if HAS_HEAD:
            keys = tl.load(rows[None, :] + d[:, None], there[None, :] & (d[:, None] < key_width), 0.0).to(query.dtype)
            score += product(query, keys)
        if IS_LATENT:
            score += product(latent, tl.trans(value))
        score *= scale
        if SCALED:
            score *= scales_of(rows, width, there, 0)[None, :]
        if HAS_SOFTCAP:
            score = softcap * (2.0 * tl.sigmoid(2.0 * score / softcap) - 1.0)
        if HAS_ALIBI:
            score += slope[:, None] * (key[None, :] - position[:, None]).to(tl.float32)
        seen = there[None, :] & (key[None, :] >= first_seen[:, None]) & (key[None, :] <= position[:, None])
        score = tl.where(seen, score * LOG2E, float("-inf"))
        peak = tl.maximum(top, tl.max(score, 1))
        base = tl.where(peak == float("-inf"), 0.0, peak)
        weight = tl.exp2(score - base[:, None])
        factor = tl.exp2(top - base)
        total = total * factor + tl.sum(weight, 1)
        if SCALED:
            weight *= scales_of(rows, width, there, 1)[None, :]
        sums = sums * factor[:, None] + product(weight.to(query.dtype), value)
        top = peak

    place = token * heads + head
    is_value = is_row[:, None] & (e[None, :] < value_width)
    if IS_SPLIT:
        place = place * splits + part
        tl.store(weights + 2 * place, top, is_row)
        tl.store(weights + 2 * place + 1, total, is_row)
        tl.store(values + place[:, None] * value_width + e[None, :], sums, is_value)
    else:
        if HAS_SINKS:
            sink = tl.load(sinks + head, is_row, 0.0).to(tl.float32) * LOG2E
            peak = tl.maximum(top, sink)
            total = total * tl.exp2(top - peak) + tl.exp2(sink - peak)
            sums *= tl.exp2(top - peak)[:, None]
        result = sums / tl.where(total > 0.0, total, 1.0)[:, None]
        tl.store(out + place[:, None] * value_width + e[None, :], result.to(query.dtype), is_value)


@triton.jit
def merge_splits(
    values, weights, sinks, out, heads, value_width, splits,
    HAS_SINKS: tl.constexpr, SPLITS: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """out [T, H, Dv] of the splits of each head of a token. Grid: tokens, heads."""
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    place = token * heads + head
    part, e = tl.arange(0, SPLITS), tl.arange(0, BLOCK_V)
    there, is_value = part < splits, e < value_width
    top = tl.load(weights + (place * splits + part) * 2, there, float("-inf"))
    total = tl.load(weights + (place * splits + part) * 2 + 1, there, 0.0)
    peak = tl.max(top, 0)
    if HAS_SINKS:
        sink = tl.load(sinks + head).to(tl.float32) * LOG2E
        peak = tl.maximum(peak, sink)
    factor = tl.exp2(top - peak)
    whole = tl.sum(total * factor, 0)
    if HAS_SINKS:
        whole += tl.exp2(sink - peak)
    at = values + (place * splits + part)[:, None] * value_width + e[None, :]
    sums = tl.sum(tl.load(at, there[:, None] & is_value[None, :], 0.0) * factor[:, None], 0)
    tl.store(out + place * value_width + e, (sums / whole).to(out.dtype.element_ty), is_value)


_TYPES = dict.fromkeys(("q", "cache", "sinks", "out"), "*bf16")
_TYPES |= {"page_table": "*i64", "cu_seqlens_q": "*i32", "seq_lens": "*i32", "alibi": "*fp32", "values": "*fp32"}
_TYPES |= {"weights": "*fp32", "scale": "fp32", "softcap": "fp32"}
_FLAGS = dict.fromkeys(("DECODES", "IS_SPLIT", "IS_LATENT", "SCALED", "HAS_SINKS", "HAS_ALIBI", "HAS_SOFTCAP"), False)
_FLAGS |= {"HAS_HEAD": True, "BLOCK_D": 128, "BLOCK_V": 128, "BLOCK_ROWS": 16, "BLOCK_KEYS": 64}
_DECODE = {**_FLAGS, "DECODES": True, "IS_SPLIT": True}
_MERGE = {"values": "*fp32", "weights": "*fp32", "sinks": "*bf16", "out": "*bf16"}
VARIANTS = [
    Variant(attention_rows, "decode, bf16, heads of 128", _TYPES, _DECODE, must=("HMMA",)),
    Variant(attention_rows, "decode, cache of int8", {**_TYPES, "cache": "*i8"}, {**_DECODE, "SCALED": True}, must=("HMMA",)),
    Variant(attention_rows, "decode, cache of fp8", {**_TYPES, "cache": "*fp8e4nv"}, {**_DECODE, "SCALED": True}, must=("HMMA",)),
    Variant(
        attention_rows,
        "decode, heads of 64, sinks, window",
        _TYPES,
        {**_DECODE, "HAS_SINKS": True, "BLOCK_D": 64, "BLOCK_V": 64},
        must=("HMMA",),
    ),
    Variant(
        attention_rows,
        "decode, latent 576",
        _TYPES,
        {**_DECODE, "IS_LATENT": True, "BLOCK_D": 64, "BLOCK_V": 512, "BLOCK_KEYS": 32},
        num_warps=8,
        must=("HMMA",),
    ),
    Variant(attention_rows, "prefill, bf16, heads of 128", _TYPES, {**_FLAGS, "BLOCK_ROWS": 128}, num_warps=8, must=("HGMMA",)),
    Variant(
        attention_rows,
        "prefill, heads of 256, softcap",
        _TYPES,
        {**_FLAGS, "HAS_SOFTCAP": True, "BLOCK_ROWS": 64, "BLOCK_KEYS": 32, "BLOCK_D": 256, "BLOCK_V": 256},
        num_warps=8,
    ),
    Variant(
        attention_rows,
        "prefill, latent 576",
        _TYPES,
        {**_FLAGS, "IS_LATENT": True, "BLOCK_ROWS": 32, "BLOCK_KEYS": 16, "BLOCK_D": 64, "BLOCK_V": 512},
        num_warps=8,
    ),
    Variant(merge_splits, "heads of 128, 64 splits", _MERGE, {"HAS_SINKS": False, "SPLITS": 64, "BLOCK_V": 128}),
]
