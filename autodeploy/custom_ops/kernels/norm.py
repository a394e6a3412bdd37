"""Norms of rows, one program a row: RMS norm, with an addition before it, and layer norm. Statistics are in float32."""

import triton
import triton.language as tl

from autodeploy.custom_ops.gpu import Variant


@triton.jit
def rms_norm(
    x, residual, weight, total, out, inner, width, x_outer_stride, x_inner_stride, out_outer_stride, out_inner_stride,
    eps, offset,
    HAS_RESIDUAL: tl.constexpr, HAS_WEIGHT: tl.constexpr, IN_FLOAT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out [rows, width] = x / rms(x) * (offset + weight); with a residual x is x + residual, which goes to total (all dense).

    IN_FLOAT: the weight is applied before the result is rounded.
    """
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    mask = column < width
    at = row // inner * x_outer_stride + row % inner * x_inner_stride + column
    value = tl.load(x + at, mask, 0.0)
    if HAS_RESIDUAL:
        value = (value.to(tl.float32) + tl.load(residual + at, mask, 0.0).to(tl.float32)).to(value.dtype)
        tl.store(total + at, value, mask)
    wide = value.to(tl.float32)
    normed = wide * tl.rsqrt(tl.sum(wide * wide, 0) / width + eps)
    if HAS_WEIGHT:
        factor = tl.load(weight + column, mask, 0.0).to(tl.float32)
        if not IN_FLOAT:
            normed = normed.to(value.dtype).to(tl.float32)
            factor = (factor + offset).to(value.dtype).to(tl.float32)
        else:
            factor += offset
        normed *= factor
    tl.store(out + row // inner * out_outer_stride + row % inner * out_inner_stride + column, normed.to(value.dtype), mask)


@triton.jit
def layer_norm(x, weight, bias, out, width, eps, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr):
    """out [rows, width] = (x - mean) / deviation * weight + bias; all dense."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    mask = column < width
    value = tl.load(x + row * width + column, mask, 0.0)
    wide = value.to(tl.float32)
    centered = tl.where(mask, wide - tl.sum(wide, 0) / width, 0.0)
    normed = centered * tl.rsqrt(tl.sum(centered * centered, 0) / width + eps)
    if HAS_WEIGHT:
        normed *= tl.load(weight + column, mask, 0.0).to(tl.float32)
    if HAS_BIAS:
        normed += tl.load(bias + column, mask, 0.0).to(tl.float32)
    tl.store(out + row * width + column, normed.to(value.dtype), mask)


_ROWS = dict.fromkeys(("x", "residual", "weight", "total", "out"), "*bf16") | {"eps": "fp32", "offset": "fp32"}
_PLAIN = {"HAS_RESIDUAL": False, "HAS_WEIGHT": True, "IN_FLOAT": False, "BLOCK": 4096}
VARIANTS = [
    Variant(rms_norm, "bf16, 4,096", _ROWS, _PLAIN, num_warps=8, max_registers=64),
    Variant(rms_norm, "bf16, a head of 128", _ROWS, {**_PLAIN, "BLOCK": 128}, num_warps=1, max_registers=32),
    Variant(rms_norm, "bf16, added first, 4,096", _ROWS, {**_PLAIN, "HAS_RESIDUAL": True}, num_warps=8, max_registers=64),
    Variant(
        layer_norm,
        "bf16, 4,096",
        {"x": "*bf16", "weight": "*bf16", "bias": "*bf16", "out": "*bf16", "eps": "fp32"},
        {"HAS_WEIGHT": True, "HAS_BIAS": True, "BLOCK": 4096},
        num_warps=8,
        max_registers=80,
    ),
]
