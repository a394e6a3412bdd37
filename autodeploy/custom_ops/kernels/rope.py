"""Rotary embedding, and what happens to keys and values on their way into the cache: one program a head of a token."""

import triton
import triton.language as tl

from autodeploy.custom_ops.gpu import Variant

SCALE_BYTES = tl.constexpr(8)


@triton.jit
def normed(first, second, weight, i, j, mask, width, eps, offset, HAS_WEIGHT: tl.constexpr, IN_FLOAT: tl.constexpr):
    """Two halves of a head, float32, over their root mean square; as `rms_norm` rounds them."""
    dtype = first.dtype
    first, second = first.to(tl.float32), second.to(tl.float32)
    factor = tl.rsqrt((tl.sum(first * first, 0) + tl.sum(second * second, 0)) / width + eps)
    first, second = first * factor, second * factor
    if HAS_WEIGHT:
        one, other = tl.load(weight + i, mask, 0.0).to(tl.float32), tl.load(weight + j, mask, 0.0).to(tl.float32)
        if IN_FLOAT:
            first, second = first * (one + offset), second * (other + offset)
        else:
            first = first.to(dtype).to(tl.float32) * (one + offset).to(dtype).to(tl.float32)
            second = second.to(dtype).to(tl.float32) * (other + offset).to(dtype).to(tl.float32)
    return first.to(dtype), second.to(dtype)


@triton.jit
def turned(
    row, cos, sin, weight, width, eps, offset,
    NORM: tl.constexpr, HAS_WEIGHT: tl.constexpr, IN_FLOAT: tl.constexpr, INTERLEAVED: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """A head at `row` after its norm (if any) and its rotation: two vectors, their places in the head, and which are there."""
    at = tl.arange(0, HALF)
    half = width // 2
    mask = at < half
    i = 2 * at if INTERLEAVED else at
    j = i + (1 if INTERLEAVED else half)
    first, second = tl.load(row + i, mask, 0.0), tl.load(row + j, mask, 0.0)
    dtype = first.dtype
    if NORM:
        first, second = normed(first, second, weight, i, j, mask, width, eps, offset, HAS_WEIGHT, IN_FLOAT)
    a, b = first.to(tl.float32), second.to(tl.float32)
    x = a * tl.load(cos + i, mask, 0.0).to(tl.float32) - b * tl.load(sin + i, mask, 0.0).to(tl.float32)
    y = b * tl.load(cos + j, mask, 0.0).to(tl.float32) + a * tl.load(sin + j, mask, 0.0).to(tl.float32)
    return x.to(dtype), y.to(dtype), i, j, mask


@triton.jit
def in_bits(x, scale, dtype: tl.constexpr):
    """The nearest multiples of a scale, in a dtype of 8 bits."""
    ratio = tl.div_rn(x.to(tl.float32), tl.where(scale > 0.0, scale, 1.0))
    if dtype == tl.int8:
        ratio = (ratio + 12582912.0) - 12582912.0  # to whole numbers: floats of that size have no fractions
    return ratio.to(dtype)


@triton.jit
def largest(dtype: tl.constexpr):
    """Number of a dtype of 8 bits."""
    return 127.0 if dtype == tl.int8 else 448.0


@triton.jit
def keep(row, x, at, mask, place, width, WHICH: tl.constexpr, SCALED: tl.constexpr):
    """Numbers x at places `place + at` of a row of the cache; WHICH: 0 their scale is the keys', 1 the values', 2 both."""
    dtype: tl.constexpr = row.dtype.element_ty
    if SCALED:
        scale = tl.div_rn(tl.max(tl.abs(x.to(tl.float32)), 0), largest(dtype))
        tl.store(row + place + at, in_bits(x, scale, dtype), mask)
        scales = (row + width - SCALE_BYTES).to(tl.pointer_type(tl.float32))
        if WHICH != 1:
            tl.store(scales, scale)
        if WHICH != 0:
            tl.store(scales + 1, scale)
    else:
        tl.store(row + place + at, x, mask)


@triton.jit
def rope(
    x, cos, sin, out, width, x_head_stride, x_token_stride, out_head_stride, out_token_stride,
    INTERLEAVED: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """Heads of tokens, turned. Grid: tokens, heads."""
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row = x + head * x_head_stride + token * x_token_stride
    a, b, i, j, mask = turned(
        row, cos + token * width, sin + token * width, row, width, 0.0, 0.0, False, False, False, INTERLEAVED, HALF
    )
    out += head * out_head_stride + token * out_token_stride
    tl.store(out + i, a, mask)
    tl.store(out + j, b, mask)


@triton.jit
def rope_append(
    q, k, v, cache, slots, cos, sin, q_weight, k_weight, out, heads, kv_heads, width, v_width, row_width,
    q_head_stride, q_token_stride, k_head_stride, k_token_stride, v_head_stride, v_token_stride, out_head_stride,
    out_token_stride, eps, offset,
    NORM: tl.constexpr, Q_WEIGHT: tl.constexpr, K_WEIGHT: tl.constexpr, IN_FLOAT: tl.constexpr, INTERLEAVED: tl.constexpr,
    SCALED: tl.constexpr, HALF: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Turned queries to out; turned keys and values to their slots of cache [slots, kv_heads, row_width]. Grid: tokens, heads."""
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    cos += token * width
    sin += token * width
    if head < heads:
        row = q + head * q_head_stride + token * q_token_stride
        a, b, i, j, mask = turned(row, cos, sin, q_weight, width, eps, offset, NORM, Q_WEIGHT, IN_FLOAT, INTERLEAVED, HALF)
        out += head * out_head_stride + token * out_token_stride
        tl.store(out + i, a, mask)
        tl.store(out + j, b, mask)
    else:
        head -= heads
        row = k + head * k_head_stride + token * k_token_stride
        a, b, i, j, mask = turned(row, cos, sin, k_weight, width, eps, offset, NORM, K_WEIGHT, IN_FLOAT, INTERLEAVED, HALF)
        kept = cache + (tl.load(slots + token) * kv_heads + head) * row_width
        # both halves have one scale
        at = tl.join(i, j)
        keep(kept, tl.join(a, b).reshape(2 * HALF), at.reshape(2 * HALF), tl.join(mask, mask).reshape(2 * HALF), 0, row_width, 0,
             SCALED)  # fmt: skip
        column = tl.arange(0, BLOCK_V)
        there = column < v_width
        value = tl.load(v + head * v_head_stride + token * v_token_stride + column, there, 0.0)
        keep(kept, value, column, there, width, row_width, 1, SCALED)


@triton.jit
def kv_append(
    k, v, cache, slots, kv_heads, width, v_width, row_width, k_head_stride, k_token_stride, k_dim_stride, v_head_stride,
    v_token_stride, v_dim_stride,
    HAS_V: tl.constexpr, SCALED: tl.constexpr, BLOCK: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Keys and values to their slots of cache [slots, kv_heads, row_width]. Grid: tokens, heads."""
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row = cache + (tl.load(slots + token) * kv_heads + head) * row_width
    column = tl.arange(0, BLOCK)
    mask = column < width
    key = tl.load(k + head * k_head_stride + token * k_token_stride + column * k_dim_stride, mask, 0.0)
    keep(row, key, column, mask, 0, row_width, 0 if HAS_V else 2, SCALED)
    if HAS_V:
        column = tl.arange(0, BLOCK_V)
        mask = column < v_width
        value = tl.load(v + head * v_head_stride + token * v_token_stride + column * v_dim_stride, mask, 0.0)
        keep(row, value, column, mask, width, row_width, 1, SCALED)


_TYPES = dict.fromkeys(("x", "q", "k", "v", "cache", "cos", "sin", "q_weight", "k_weight", "out"), "*bf16")
_TYPES |= {"slots": "*i64", "eps": "fp32", "offset": "fp32"}
_HEADS = {"INTERLEAVED": False, "HALF": 64}
_APPEND = {**_HEADS, "NORM": True, "Q_WEIGHT": True, "K_WEIGHT": True, "IN_FLOAT": False, "SCALED": False, "BLOCK_V": 128}
_KEEP = {"HAS_V": True, "SCALED": False, "BLOCK": 128, "BLOCK_V": 128}
_LATENT = {**_KEEP, "HAS_V": False, "SCALED": True, "BLOCK": 1024}
_INT8, _FP8 = _TYPES | {"cache": "*i8"}, _TYPES | {"cache": "*fp8e4nv"}
_SCALED = {**_APPEND, "SCALED": True}
VARIANTS = [
    Variant(rope, "bf16, heads of 128", _TYPES, _HEADS, num_warps=1, max_registers=64),
    Variant(rope_append, "bf16, normed, heads of 128", _TYPES, _APPEND, num_warps=1, max_registers=96),
    Variant(rope_append, "the same, cache of int8", _INT8, _SCALED, num_warps=1, max_registers=96),
    Variant(rope_append, "the same, cache of fp8", _FP8, _SCALED, num_warps=1, max_registers=96),
    Variant(kv_append, "bf16, heads of 128", _TYPES, _KEEP, num_warps=1, max_registers=64),
    Variant(kv_append, "latent, 576, cache of fp8", _FP8, _LATENT, num_warps=4, max_registers=64),
]
