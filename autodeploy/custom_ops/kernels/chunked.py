"""Recurrences over the tokens of prompts, a chunk at a time: what tokens of a chunk do to each other is a matrix product.

As in recurrent.py a program takes one request, one head and some rows of its state, which it keeps in registers, in float32. Log
decays are added up and subtracted in float64. Products are of TF32, which holds inputs of 16 bits as they are; as three of
TF32 each, as near as float32, they would take more registers than there are.
"""

import triton
import triton.language as tl

from autodeploy.custom_ops.gpu import Variant
from autodeploy.custom_ops.kernels.recurrent import request_of, wide


@triton.jit
def times(a, b):
    return tl.dot(a, b, input_precision="tf32")


@triton.jit
def decays(log, TOKENS: tl.constexpr):
    """From log decays [TOKENS]: what is left of token j at token i (0 for j > i), of the state at each token, of each token at
    the end, and of the state there.
    """
    token = tl.arange(0, TOKENS)
    total = tl.cumsum(log.to(tl.float64), 0)
    end = tl.sum(log.to(tl.float64), 0)
    left = tl.where(token[:, None] >= token[None, :], total[:, None] - total[None, :], float("-inf"))
    return (
        tl.exp(left.to(tl.float32)),
        tl.exp(total.to(tl.float32)),
        tl.exp((end - total).to(tl.float32)),
        tl.exp(end.to(tl.float32)),
    )


@triton.jit
def ssd(
    x, dt, a, b, c, state_cache, state_slots, cu_seqlens_q, seq_lens, out,
    heads, heads_per_group, x_width, state_width, x_stride, dt_stride, b_stride, c_stride,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """h = exp(dt a) h + dt x b^T and out = h c, for ROWS of a head's state h [x_width, state_width]."""
    first, last, slot, goes_on = request_of(state_slots, cu_seqlens_q, seq_lens)  # pyright: ignore[reportGeneralTypeIssues]
    head = tl.program_id(1)
    row, column = tl.program_id(2) * ROWS + tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    in_row, in_column = row < x_width, column < state_width
    mask = in_row[:, None] & in_column[None, :]
    state = state_cache + ((slot * heads + head) * x_width + row)[:, None] * state_width + column[None, :]
    h = wide(state, mask & goes_on)
    rate = tl.load(a + head).to(tl.float32)
    x += head * x_width + row[None, :]
    out += head * x_width + row[None, :]
    b += head // heads_per_group * state_width + column[None, :]
    c += head // heads_per_group * state_width + column[None, :]
    for start in range(first, last, TOKENS):
        token = start + tl.arange(0, TOKENS)
        is_in = token < last
        at, in_x, in_b = token[:, None], is_in[:, None] & in_row[None, :], is_in[:, None] & in_column[None, :]
        step = wide(dt + token * dt_stride + head, is_in)
        pairs, since, until, whole = decays(step * rate, TOKENS)  # pyright: ignore[reportGeneralTypeIssues]
        taken = step[:, None] * wide(x + at * x_stride, in_x)
        into, read = wide(b + at * b_stride, in_b), wide(c + at * c_stride, in_b)
        y = times(times(read, tl.trans(into)) * pairs, taken) + since[:, None] * times(read, tl.trans(h))
        h = whole * h + times(tl.trans(taken), into * until[:, None])
        tl.store(out + at * heads * x_width, y, in_x)
    tl.debug_barrier()  # no thread writes what another has yet to read
    tl.store(state, h, mask)


_REQUESTS = {"state_cache": "*fp32", "state_slots": "*i64", "cu_seqlens_q": "*i32", "seq_lens": "*i32", "out": "*fp32"}
_SSD = {"x": "*bf16", "dt": "*fp32", "a": "*fp32", "b": "*bf16", "c": "*bf16", **_REQUESTS}
VARIANTS = [
    Variant(
        ssd,
        "bf16, states of 64 x 128",
        _SSD,
        {"ROWS": 32, "COLUMNS": 128, "TOKENS": 16},
        num_warps=4,
        num_stages=1,
        must=("HMMA",),
    )
]
