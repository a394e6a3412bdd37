"""The gated delta rule over the tokens of prompts, a chunk at a time, in two kernels, where a head's memory fades as a whole.

What the tokens of a chunk do to each other does not depend on the memory: the first kernel does it for all chunks at once, and
inverts their triangular systems in float32. The second goes over a request's chunks with products alone, some columns of a head's
memory in registers. Keys are divided in four, so that no operand is a whole key wide. Products that a system is made of, or
solved with, are three of TF32 each, as near as float32; those with the memory are of TF32. Log decays are added up in float64.
"""

import triton
import triton.language as tl

from autodeploy.custom_ops.gpu import Variant
from autodeploy.custom_ops.kernels.chunked import decays, times
from autodeploy.custom_ops.kernels.recurrent import request_of, wide


@triton.jit
def product(a, b):
    return tl.dot(a, b, input_precision="tf32x3")


@triton.jit
def chunk_of(cu_seqlens_q, requests, TOKENS: tl.constexpr):
    """The program's chunk: its first token, the one after the request's last. Programs are as many as there can be chunks."""
    chunk, low, high = tl.program_id(0), 0, requests
    while high - low > 1:
        middle = (low + high) // 2
        if tl.load(cu_seqlens_q + middle) // TOKENS + middle <= chunk:
            low = middle
        else:
            high = middle
    first, last = tl.load(cu_seqlens_q + low), tl.load(cu_seqlens_q + low + 1)
    return (first + (chunk - first // TOKENS - low) * TOKENS).to(tl.int64), last.to(tl.int64)


@triton.jit
def within_chunks(
    q, k, decay, beta, cu_seqlens_q, inverses, scores,
    requests, heads, heads_per_key, k_width, q_stride, k_stride, decay_stride, beta_stride,
    DEPTH: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """For each token a row [TOKENS] of (1 + beta k (decays k)^T)^-1 beta, of tokens before it, and one of q (decays k)^T."""
    start, last = chunk_of(cu_seqlens_q, requests, TOKENS)
    head = tl.program_id(1)
    i = tl.arange(0, TOKENS)
    token, channel = start + i, tl.arange(0, DEPTH)
    is_in = token < last
    at = token[:, None]
    q += head // heads_per_key * k_width + at * q_stride
    k += head // heads_per_key * k_width + at * k_stride
    keys = tl.zeros((TOKENS, TOKENS), tl.float32)
    read = tl.zeros((TOKENS, TOKENS), tl.float32)
    for part in range(0, k_width, DEPTH):
        column = part + channel[None, :]
        mask = is_in[:, None] & (column < k_width)
        key = wide(k + column, mask)
        keys += product(key, tl.trans(key))
        read += product(wide(q + column, mask), tl.trans(key))
    pairs, _, _, _ = decays(wide(decay + token * decay_stride + head, is_in), TOKENS)
    weight = wide(beta + token * beta_stride + head, is_in)
    system = tl.where(i[:, None] > i[None, :], weight[:, None] * keys * pairs, 0.0)
    inverse = tl.where(i[:, None] == i[None, :], 1.0, 0.0)
    for row in range(1, TOKENS):
        factors = tl.sum(tl.where(i[:, None] == row, system, 0.0), 0)
        solved = tl.sum(factors[:, None] * inverse, 0)
        inverse -= tl.where(i[:, None] == row, solved[None, :], 0.0)
    place = (at * heads + head) * TOKENS + i[None, :]
    tl.store(inverses + place, inverse * weight[None, :], is_in[:, None])
    tl.store(scores + place, read * pairs, is_in[:, None])


@triton.jit
def place_of(state_cache, state_slots, heads, first_row, K_WIDTH: tl.constexpr, V_WIDTH: tl.constexpr, row, column):
    """Rows of the program's memory from `first_row` on: where they are, and which are there."""
    slot = tl.load(state_slots + tl.program_id(0)).to(tl.int64)
    state = state_cache + (slot * heads + tl.program_id(1)) * K_WIDTH * V_WIDTH
    row += first_row
    return state + row[:, None] * V_WIDTH + column[None, :], (row < K_WIDTH)[:, None] & (column < V_WIDTH)[None, :]


@triton.jit
def remembered(state_cache, state_slots, heads, first_row, K_WIDTH: tl.constexpr, V_WIDTH: tl.constexpr, row, column, goes_on):
    at, mask = place_of(state_cache, state_slots, heads, first_row, K_WIDTH, V_WIDTH, row, column)
    return wide(at, mask & goes_on)


@triton.jit
def remember(state_cache, state_slots, heads, first_row, K_WIDTH: tl.constexpr, V_WIDTH: tl.constexpr, row, column, m):
    """Finds the place anew: to keep it since the start would take registers that the loop needs."""
    at, mask = place_of(state_cache, state_slots, heads, first_row, K_WIDTH, V_WIDTH, row, column)
    tl.store(at, m, mask)


@triton.jit
def answers(q, k, first_row, K_WIDTH: tl.constexpr, row, is_in, m, read, answered):
    """A part of the keys; and what a part of the memory gives to queries and to keys [TOKENS, ...], added up."""
    mask = is_in[:, None] & (row + first_row < K_WIDTH)[None, :]
    key = wide(k + first_row + row[None, :], mask)
    read += times(wide(q + first_row + row[None, :], mask), m)
    answered += times(key, m)
    return key, read, answered


@triton.jit
def across_chunks(
    q, k, v, decay, inverses, scores, state_cache, state_slots, cu_seqlens_q, seq_lens, out,
    heads, heads_per_key, q_stride, k_stride, v_stride, decay_stride,
    K_WIDTH: tl.constexpr, V_WIDTH: tl.constexpr, DEPTH: tl.constexpr, COLUMNS: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """As `gated_delta_rule`, for COLUMNS of a head's memory m [K_WIDTH, V_WIDTH], of which K_WIDTH is up to four times DEPTH."""
    first, last, _, goes_on = request_of(state_slots, cu_seqlens_q, seq_lens)  # pyright: ignore[reportGeneralTypeIssues]
    head = tl.program_id(1)
    row, column = tl.arange(0, DEPTH), tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    m0 = remembered(state_cache, state_slots, heads, 0 * DEPTH, K_WIDTH, V_WIDTH, row, column, goes_on)
    m1 = remembered(state_cache, state_slots, heads, 1 * DEPTH, K_WIDTH, V_WIDTH, row, column, goes_on)
    m2 = remembered(state_cache, state_slots, heads, 2 * DEPTH, K_WIDTH, V_WIDTH, row, column, goes_on)
    m3 = remembered(state_cache, state_slots, heads, 3 * DEPTH, K_WIDTH, V_WIDTH, row, column, goes_on)
    i = tl.arange(0, TOKENS)
    for start in range(first, last, TOKENS):
        token = start + i
        is_in = token < last
        at = token[:, None]
        queries = q + head // heads_per_key * K_WIDTH + at * q_stride
        keys = k + head // heads_per_key * K_WIDTH + at * k_stride
        read = tl.zeros((TOKENS, COLUMNS), tl.float32)
        answered = tl.zeros((TOKENS, COLUMNS), tl.float32)
        k0, read, answered = answers(queries, keys, 0 * DEPTH, K_WIDTH, row, is_in, m0, read, answered)
        k1, read, answered = answers(queries, keys, 1 * DEPTH, K_WIDTH, row, is_in, m1, read, answered)
        k2, read, answered = answers(queries, keys, 2 * DEPTH, K_WIDTH, row, is_in, m2, read, answered)
        k3, read, answered = answers(queries, keys, 3 * DEPTH, K_WIDTH, row, is_in, m3, read, answered)
        total = wide(decay + token * decay_stride + head, is_in).to(tl.float64)
        end, total = tl.sum(total, 0), tl.cumsum(total, 0)
        since, until = tl.exp(total.to(tl.float32)), tl.exp((end - total).to(tl.float32))
        whole = tl.exp(end.to(tl.float32))
        in_v = is_in[:, None] & (column < V_WIDTH)[None, :]
        missing = wide(v + at * v_stride + head * V_WIDTH + column[None, :], in_v) - since[:, None] * answered
        place = (at * heads + head) * TOKENS + i[None, :]
        correction = product(wide(inverses + place, is_in[:, None]), missing)
        y = since[:, None] * read + product(wide(scores + place, is_in[:, None]), correction)
        tl.store(out + (at * heads + head) * V_WIDTH + column[None, :], y, in_v)
        correction *= until[:, None]
        m0 = whole * m0 + times(tl.trans(k0), correction)
        m1 = whole * m1 + times(tl.trans(k1), correction)
        m2 = whole * m2 + times(tl.trans(k2), correction)
        m3 = whole * m3 + times(tl.trans(k3), correction)
    tl.debug_barrier()  # no thread writes what another has yet to read
    remember(state_cache, state_slots, heads, 0 * DEPTH, K_WIDTH, V_WIDTH, row, column, m0)
    remember(state_cache, state_slots, heads, 1 * DEPTH, K_WIDTH, V_WIDTH, row, column, m1)
    remember(state_cache, state_slots, heads, 2 * DEPTH, K_WIDTH, V_WIDTH, row, column, m2)
    remember(state_cache, state_slots, heads, 3 * DEPTH, K_WIDTH, V_WIDTH, row, column, m3)


_REQUESTS = {"state_cache": "*fp32", "state_slots": "*i64", "cu_seqlens_q": "*i32", "seq_lens": "*i32", "out": "*fp32"}
_TOKENS = {"q": "*fp32", "k": "*fp32", "v": "*bf16", "decay": "*fp32", "beta": "*bf16", "inverses": "*fp32", "scores": "*fp32"}
_TYPES = {**_TOKENS, **_REQUESTS}
VARIANTS = [
    Variant(
        within_chunks,
        "bf16, keys of 128",
        _TYPES,
        {"DEPTH": 32, "TOKENS": 16},
        num_warps=1,
        num_stages=1,
        must=("HMMA",),
    ),
    Variant(
        across_chunks,
        "bf16, memory of 128 x 128",
        _TYPES,
        {"K_WIDTH": 128, "V_WIDTH": 128, "DEPTH": 32, "COLUMNS": 32, "TOKENS": 16},
        num_warps=4,
        num_stages=1,
        must=("HMMA",),
    ),
]
