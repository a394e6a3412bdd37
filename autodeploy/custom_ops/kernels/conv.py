"""Convolutions along the tokens of the requests of a row, which go on from the last inputs of each."""

import triton
import triton.language as tl

from autodeploy.custom_ops.gpu import Variant
from autodeploy.custom_ops.kernels.gated import activated
from autodeploy.custom_ops.kernels.recurrent import request_of


@triton.jit
def inputs_at(token, end, x, x_stride, state, goes_on, channels, width, TAPS: tl.constexpr):
    """Inputs [tokens, channels] of one request, zeros from `end` on; tokens below 0 lie in its state, as its TAPS - 1 rows."""
    within = (channels < width)[None, :]
    now = tl.load(x + token[:, None] * x_stride + channels[None, :], within & ((token >= 0) & (token < end))[:, None], 0.0)
    is_old = ((token < 0) & (token > -TAPS) & goes_on)[:, None]
    old = tl.load(state + (token + TAPS - 1)[:, None] * width + channels[None, :], within & is_old, 0.0)
    return tl.where(is_old, old.to(now.dtype), now)


@triton.jit
def causal_conv1d(
    x, weight, bias, state_cache, state_slots, cu_seqlens_q, seq_lens, out, width, x_stride,
    TAPS: tl.constexpr, HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr,
    TOKENS: tl.constexpr, STATE_ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out = activation(bias + sum over k of weight[:, k] * the input TAPS - 1 - k tokens before); the last inputs go to state.

    A program takes BLOCK channels of a request, and of its parts of TOKENS tokens every so many-th. Only the program of the first
    part touches the state: where there are several, TOKENS is at least TAPS - 1.
    """
    first, last, slot, goes_on = request_of(state_slots, cu_seqlens_q, seq_lens)  # pyright: ignore[reportGeneralTypeIssues]
    channels = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    within = channels < width
    x += first * x_stride
    out += first * width
    state = state_cache + slot * (TAPS - 1) * width
    for start in range(tl.program_id(2) * TOKENS, last - first, tl.num_programs(2) * TOKENS):
        token = start + tl.arange(0, TOKENS)
        total = tl.zeros((TOKENS, BLOCK), tl.float32)
        if HAS_BIAS:
            total += tl.load(bias + channels, within, 0.0).to(tl.float32)[None, :]
        for k in tl.static_range(TAPS):
            tap = tl.load(weight + channels * TAPS + k, within, 0.0).to(tl.float32)
            seen = inputs_at(token - (TAPS - 1 - k), last - first, x, x_stride, state, goes_on, channels, width, TAPS)
            total += seen.to(tl.float32) * tap[None, :]
        if ACTIVATION != "none":
            total = activated(total.to(weight.dtype.element_ty).to(tl.float32), ACTIVATION)
        y = total.to(weight.dtype.element_ty).to(x.dtype.element_ty)
        tl.store(out + token[:, None] * width + channels[None, :], y, within[None, :] & (token < last - first)[:, None])
    if tl.program_id(2) == 0:
        row = tl.arange(0, STATE_ROWS)
        newest = inputs_at(last - first - (TAPS - 1) + row, last - first, x, x_stride, state, goes_on, channels, width, TAPS)
        tl.debug_barrier()  # no thread writes what another has yet to read
        at = state + row[:, None] * width + channels[None, :]
        tl.store(at, newest.to(state_cache.dtype.element_ty), within[None, :] & (row < TAPS - 1)[:, None])


_TYPES = dict.fromkeys(("x", "weight", "bias", "state_cache", "out"), "*bf16")
_TYPES |= {"state_slots": "*i64", "cu_seqlens_q": "*i32", "seq_lens": "*i32"}
_PLAIN = {"TAPS": 4, "HAS_BIAS": True, "ACTIVATION": "silu", "STATE_ROWS": 4}
VARIANTS = [
    Variant(causal_conv1d, "bf16, 4 taps, decode", _TYPES, {**_PLAIN, "TOKENS": 1, "BLOCK": 256}, num_warps=2, max_registers=48),
    Variant(causal_conv1d, "bf16, 4 taps, prefill", _TYPES, {**_PLAIN, "TOKENS": 16, "BLOCK": 64}, num_warps=4, max_registers=80),
]
