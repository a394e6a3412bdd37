"""Recurrences over the requests of a row: a program takes one request, one head and some rows or columns of its state.

It keeps its part of the state in registers, in float32, while it goes over the request's tokens, be it one or a prompt. It reads
for itself which tokens those are, so nothing has to be known on the host. Outputs are float32 and dense.
"""

import triton
import triton.language as tl

from autodeploy.custom_ops.gpu import Variant


@triton.jit
def request_of(state_slots, cu_seqlens_q, seq_lens):
    """The program's request: its first token in the row, the one after its last, its slot, whether its state is to be read."""
    request = tl.program_id(0)
    first = tl.load(cu_seqlens_q + request)
    last = tl.load(cu_seqlens_q + request + 1)
    goes_on = tl.load(seq_lens + request) != last - first
    return first.to(tl.int64), last.to(tl.int64), tl.load(state_slots + request).to(tl.int64), goes_on


@triton.jit
def wide(at, mask):
    """Numbers as float32, zero where the mask is not set."""
    return tl.load(at, mask, 0.0).to(tl.float32)


@triton.jit
def ssd(
    x, dt, a, b, c, state_cache, state_slots, cu_seqlens_q, seq_lens, out,
    heads, heads_per_group, x_width, state_width, x_stride, dt_stride, b_stride, c_stride,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """h = exp(dt a) h + dt x b^T and out = h c, for ROWS of a head's state h [x_width, state_width].

    Strides are from token to token, here and below.
    """
    first, last, slot, goes_on = request_of(state_slots, cu_seqlens_q, seq_lens)  # pyright: ignore[reportGeneralTypeIssues]
    head = tl.program_id(1)
    row, column = tl.program_id(2) * ROWS + tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    in_row, in_column = row < x_width, column < state_width
    mask = in_row[:, None] & in_column[None, :]
    state = state_cache + ((slot * heads + head) * x_width + row)[:, None] * state_width + column[None, :]
    h = wide(state, mask & goes_on)
    rate = tl.load(a + head).to(tl.float32)
    x += head * x_width + row
    b += head // heads_per_group * state_width + column
    c += head // heads_per_group * state_width + column
    for token in range(first, last):
        step = tl.load(dt + token * dt_stride + head).to(tl.float32)
        taken = (step * wide(x + token * x_stride, in_row))[:, None] * wide(b + token * b_stride, in_column)[None, :]
        h = tl.exp(step * rate) * h + taken
        y = tl.sum(h * wide(c + token * c_stride, in_column)[None, :], 1)
        tl.store(out + (token * heads + head) * x_width + row, y, in_row)
    tl.debug_barrier()  # no thread writes what another has yet to read
    tl.store(state, h, mask)


@triton.jit
def selective_scan(
    x, dt, a, b, c, state_cache, state_slots, cu_seqlens_q, seq_lens, out,
    x_width, state_width, x_stride, dt_stride, b_stride, c_stride,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """h = exp(dt a) h + dt x b^T and out = h c, for ROWS channels of a state h [x_width, state_width] with as large an a."""
    first, last, slot, goes_on = request_of(state_slots, cu_seqlens_q, seq_lens)  # pyright: ignore[reportGeneralTypeIssues]
    row, column = tl.program_id(1) * ROWS + tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    in_row, in_column = row < x_width, column < state_width
    mask = in_row[:, None] & in_column[None, :]
    place = row[:, None] * state_width + column[None, :]
    state = state_cache + slot * x_width * state_width + place
    h = wide(state, mask & goes_on)
    rate = wide(a + place, mask)
    for token in range(first, last):
        step = wide(dt + token * dt_stride + row, in_row)
        taken = (step * wide(x + token * x_stride + row, in_row))[:, None] * wide(b + token * b_stride + column, in_column)[
            None, :
        ]
        h = tl.exp(step[:, None] * rate) * h + taken
        y = tl.sum(h * wide(c + token * c_stride + column, in_column)[None, :], 1)
        tl.store(out + token * x_width + row, y, in_row)
    tl.debug_barrier()  # no thread writes what another has yet to read
    tl.store(state, h, mask)


@triton.jit
def gated_delta_rule(
    q, k, v, decay, beta, state_cache, state_slots, cu_seqlens_q, seq_lens, out,
    heads, heads_per_key, k_width, v_width, q_stride, k_stride, v_stride, decay_stride, beta_stride,
    BY_CHANNEL: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """m = exp(decay) m, m += k (beta (v - m^T k))^T and out = m^T q, for COLUMNS of a head's memory m [k_width, v_width].

    BY_CHANNEL: each row of m fades by itself.
    """
    first, last, slot, goes_on = request_of(state_slots, cu_seqlens_q, seq_lens)  # pyright: ignore[reportGeneralTypeIssues]
    head = tl.program_id(1)
    row, column = tl.arange(0, ROWS), tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    in_row, in_column = row < k_width, column < v_width
    mask = in_row[:, None] & in_column[None, :]
    state = state_cache + ((slot * heads + head) * k_width + row)[:, None] * v_width + column[None, :]
    m = wide(state, mask & goes_on)
    q += head // heads_per_key * k_width + row
    k += head // heads_per_key * k_width + row
    v += head * v_width + column
    for token in range(first, last):
        if BY_CHANNEL:
            m *= tl.exp(wide(decay + token * decay_stride + head * k_width + row, in_row))[:, None]
        else:
            m *= tl.exp(tl.load(decay + token * decay_stride + head).to(tl.float32))
        key = wide(k + token * k_stride, in_row)[:, None]
        missing = wide(v + token * v_stride, in_column) - tl.sum(m * key, 0)
        m += key * (tl.load(beta + token * beta_stride + head).to(tl.float32) * missing)[None, :]
        y = tl.sum(m * wide(q + token * q_stride, in_row)[:, None], 0)
        tl.store(out + (token * heads + head) * v_width + column, y, in_column)
    tl.debug_barrier()  # no thread writes what another has yet to read
    tl.store(state, m, mask)


_REQUESTS = {"state_cache": "*fp32", "state_slots": "*i64", "cu_seqlens_q": "*i32", "seq_lens": "*i32", "out": "*fp32"}
_SCAN = {"x": "*bf16", "dt": "*fp32", "a": "*fp32", "b": "*bf16", "c": "*bf16", **_REQUESTS}
_DELTA = {"q": "*fp32", "k": "*fp32", "v": "*bf16", "decay": "*fp32", "beta": "*bf16", **_REQUESTS}
VARIANTS = [
    Variant(ssd, "bf16, states of 64 x 128", _SCAN, {"ROWS": 16, "COLUMNS": 128}, num_warps=4, max_registers=64),
    Variant(selective_scan, "bf16, states of 16", _SCAN, {"ROWS": 32, "COLUMNS": 16}, num_warps=4, max_registers=48),
    *(
        Variant(
            gated_delta_rule,
            f"bf16, memory of 128 x 128, fading by {'channel' if by_channel else 'head'}",
            _DELTA,
            {"BY_CHANNEL": by_channel, "ROWS": 128, "COLUMNS": 8},
            num_warps=1,
            max_registers=128,
        )
        for by_channel in (False, True)
    ),
]
