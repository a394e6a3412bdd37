"""The inner loop of products with matrices of few bits, which linear layers and experts share.

The weight is the left factor: its rows fill tensor cores however few rows x has, and what is widened can stay in registers.
"""

import triton
import triton.language as tl

FP4_UNIT: tl.constexpr = tl.constexpr(2.0**15)
"""What half-precision floats made of the bits of `e2m1` are too small by, when 1 stands for 0.5."""


@triton.jit
def bytes_product(
    x_at, is_row, weight_at, is_column, scales_at, scales_stride, x_width, group,
    ROUNDED: tl.constexpr, GROUPED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """[columns, rows] in float32: weight_at [BLOCK_N, BLOCK_K] of int8 or fp8, by x_at [BLOCK_K, BLOCK_M].

    ROUNDED: x is int8; otherwise the weight is widened to x's type. GROUPED: times scales_at [BLOCK_N], one for each `group`
    of columns, scales_stride apart, and BLOCK_K divides a group; otherwise no scales are used.
    """
    step = tl.arange(0, BLOCK_K)
    kind: tl.constexpr = tl.int32 if ROUNDED else tl.float32
    total = tl.zeros([BLOCK_N, BLOCK_M], kind)
    for start in range(0, x_width, BLOCK_K):
        is_step = start + step < x_width
        numbers = tl.load(weight_at + start, is_column[:, None] & is_step[None, :], 0.0)
        inputs = tl.load(x_at + start, is_row[None, :] & is_step[:, None], 0)
        if GROUPED:
            scale = tl.load(scales_at + start // group * scales_stride, is_column, 0.0)
            total += tl.dot(numbers.to(inputs.dtype), inputs) * scale[:, None]
        else:
            total = tl.dot(numbers.to(inputs.dtype), inputs, total, out_dtype=kind)
    return total.to(tl.float32)


@triton.jit
def half_bytes_product(
    x_at, is_row, weight_at, is_column, scales_at, offsets_at, scales_stride, x_width, group,
    FP4: tl.constexpr, HAS_OFFSETS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """As `bytes_product` of weight_at [BLOCK_N, BLOCK_K] of two numbers a byte, the first half of the columns in the low bits.

    BLOCK_K divides both a half and a group.
    """
    half = x_width // 2
    total = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for start in range(0, half, BLOCK_K):
        both = tl.load(weight_at + start, is_column[:, None], 0)
        inputs = tl.load(x_at + start, is_row[None, :], 0.0)
        at = start // group * scales_stride
        low = widened(both & 15, scales_at + at, offsets_at + at, is_column, FP4, HAS_OFFSETS)
        total = tl.dot(low.to(inputs.dtype), inputs, total)
        inputs = tl.load(x_at + half + start, is_row[None, :], 0.0)
        at = (half + start) // group * scales_stride
        high = widened(both >> 4, scales_at + at, offsets_at + at, is_column, FP4, HAS_OFFSETS)
        total = tl.dot(high.to(inputs.dtype), inputs, total)
    return total


@triton.jit
def widened(halves, scales_at, offsets_at, is_column, FP4: tl.constexpr, HAS_OFFSETS: tl.constexpr):
    """Codes of four bits [columns, inputs] of one group -> what they stand for, times the scale of the group, in float32."""
    scale = tl.load(scales_at, is_column, 0.0).to(tl.float32)[:, None]
    if FP4:
        return e2m1(halves) * (scale * FP4_UNIT)
    else:
        offset = tl.load(offsets_at, is_column, 0.0).to(tl.float32)[:, None] if HAS_OFFSETS else 8.0
        return (halves.to(tl.float32) - offset) * scale


@triton.jit
def e2m1(codes):
    """Floats of four bits (sign, two bits of exponent, one of mantissa) in float32, times 2 / FP4_UNIT: no bit is looked at,
    since they are those of a half-precision float too."""
    bits = codes.to(tl.int16)
    return ((bits & 7) << 9 | (bits & 8) << 12).to(tl.float16, bitcast=True).to(tl.float32)
