"""Linear layers of whole numbers, and of floats of 4 and 8 bits."""

import triton
import triton.language as tl

from autodeploy.custom_ops.gpu import Variant
from autodeploy.custom_ops.kernels.few_bits import bytes_product, half_bytes_product
from autodeploy.custom_ops.triton_quantized import BYTES, HALF_BYTES, ROUNDED

GROUP: tl.constexpr = tl.constexpr(8)
"""Tiles of rows that are made beside each other, for the same columns: what they share stays in the cache."""

INTEGERS: tl.constexpr = tl.constexpr(1.5 * 2.0**23)
"""What is added to this in float32 is rounded to whole numbers, ties to even."""


@triton.jit
def quantize_rows(x, codes, scales, x_width, BLOCK: tl.constexpr):
    """codes [rows, x_width] int8, scales [rows] float32: x, each row rounded to multiples of its largest / 127."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    value = tl.load(x + row * x_width + column, column < x_width, 0.0).to(tl.float32)
    most = tl.max(tl.abs(value), 0)
    rounded = value * tl.where(most > 0.0, 127.0 / most, 0.0) + INTEGERS - INTEGERS
    tl.store(codes + row * x_width + column, rounded.to(tl.int8), column < x_width)
    tl.store(scales + row, most / 127.0 + tl.sum(value * 0.0, 0))  # no number where the row has one that is not finite


@triton.jit
def store_tile(total, scales, bias, out, row, column, rows, out_width, HAS_SCALES: tl.constexpr, HAS_BIAS: tl.constexpr):
    """total [columns, rows] of float32, times the scales of its columns if there are any, + bias -> out [rows, out_width]."""
    if HAS_SCALES:
        total *= tl.load(scales + column, column < out_width, 0.0)[:, None]
    if HAS_BIAS:
        total += tl.load(bias + column, column < out_width, 0.0).to(tl.float32)[:, None]
    at = out + row.to(tl.int64)[:, None] * out_width + column[None, :]
    tl.store(at, tl.trans(total.to(out.dtype.element_ty)), (row < rows)[:, None] & (column < out_width)[None, :])


@triton.jit(do_not_specialize=["rows"])
def bytes_gemm(
    x, x_scales, weight, scales, bias, out, rows, x_width, out_width, group,
    ROUNDED: tl.constexpr, GROUPED: tl.constexpr, HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out [rows, out_width] = x [rows, x_width] @ (weight [out_width, x_width] * scales [out_width]) + bias.

    ROUNDED: x has been rounded to 8 bits by `quantize_rows`; otherwise the weight is widened to x's type. GROUPED: scales are
    [groups, out_width], and BLOCK_K divides a group.
    """
    tile = tl.swizzle2d(tl.program_id(1), tl.program_id(0), tl.num_programs(1), tl.num_programs(0), GROUP)
    row = tile[0] * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tile[1] * BLOCK_N + tl.arange(0, BLOCK_N)
    step = tl.arange(0, BLOCK_K)
    x_at = x + row.to(tl.int64)[None, :] * x_width + step[:, None]
    weight_at = weight + column.to(tl.int64)[:, None] * x_width + step[None, :]
    value = bytes_product(
        x_at, row < rows, weight_at, column < out_width, scales + column, out_width, x_width, group,
        ROUNDED, GROUPED, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    if ROUNDED:
        value *= tl.load(x_scales + row, row < rows, 0.0)[None, :]
    store_tile(value, scales, bias, out, row, column, rows, out_width, not GROUPED, HAS_BIAS)


@triton.jit(do_not_specialize=["rows"])
def half_bytes_gemm(
    x, weight, scales, offsets, bias, out, rows, x_width, out_width, group,
    FP4: tl.constexpr, HAS_OFFSETS: tl.constexpr, HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out [rows, out_width] = x [rows, x_width] @ the dense matrix + bias; scales and offsets [groups, out_width].

    weight [out_width, x_width / 2]: see `half_bytes_product`. FP4: of floats; offsets are of whole numbers.
    """
    tile = tl.swizzle2d(tl.program_id(1), tl.program_id(0), tl.num_programs(1), tl.num_programs(0), GROUP)
    row = tile[0] * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tile[1] * BLOCK_N + tl.arange(0, BLOCK_N)
    step = tl.arange(0, BLOCK_K)
    x_at = x + row.to(tl.int64)[None, :] * x_width + step[:, None]
    weight_at = weight + column.to(tl.int64)[:, None] * (x_width // 2) + step[None, :]
    total = half_bytes_product(
        x_at, row < rows, weight_at, column < out_width, scales + column, offsets + column if HAS_OFFSETS else scales,
        out_width, x_width, group, FP4, HAS_OFFSETS, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    store_tile(total, scales, bias, out, row, column, rows, out_width, False, HAS_BIAS)


def _bytes(label, tile, must, rounded, weight="*i8", grouped=False):
    """A variant of `bytes_gemm`."""
    types = {"x": "*i8" if rounded else "*bf16", "x_scales": "*fp32", "weight": weight, "scales": "*fp32"}
    types |= {"bias": "*bf16", "out": "*bf16"}
    constants = {"ROUNDED": rounded, "GROUPED": grouped, "HAS_BIAS": False, **tile.blocks}
    return Variant(bytes_gemm, label, types, constants, **tile.options, must=must)


def _half_bytes(label, tile, block, offsets=False, fp4=False, scales="*bf16"):
    """A variant of `half_bytes_gemm`, for groups of so many columns."""
    types = {"weight": "*u8"} | dict.fromkeys(("x", "bias", "out"), "*bf16") | dict.fromkeys(("scales", "offsets"), scales)
    constants = {"FP4": fp4, "HAS_OFFSETS": offsets, "HAS_BIAS": False, **tile.blocks, "BLOCK_K": min(block, tile.depth)}
    return Variant(half_bytes_gemm, label, types, constants, **tile.options, must=("HGMMA", "LDGSTS"))


_SIZES = ("few rows", "some rows", "many rows")
VARIANTS = [
    Variant(
        quantize_rows,
        "bf16, 4,096",
        {"x": "*bf16", "codes": "*i8", "scales": "*fp32"},
        {"BLOCK": 4096},
        num_warps=8,
        max_registers=64,
    ),
    *(_bytes(f"int8, {size}", tile, ("IGMMA", "LDGSTS"), True) for size, tile in zip(_SIZES, ROUNDED, strict=True)),
    *(_bytes(f"int8 and bf16, {size}", tile, ("HGMMA", "LDGSTS"), False) for size, tile in zip(_SIZES, BYTES, strict=True)),
    *(
        _bytes(f"fp8 and bf16{by}, {size}", tile, ("HGMMA", "LDGSTS"), False, "*fp8e4nv", grouped)
        for grouped, by in ((False, ""), (True, " by 128"))
        for size, tile in zip(_SIZES, BYTES, strict=True)
    ),
    *(_half_bytes(f"int4 by 128, {size}", tile, 128) for size, tile in zip(_SIZES, HALF_BYTES, strict=True)),
    _half_bytes("int4 by 32, zero points, few rows", HALF_BYTES[0], 32, True),
    _half_bytes("int4 by 32, zero points, many rows", HALF_BYTES[2], 32, True),
    *(_half_bytes(f"mxfp4, {size}", tile, 32, fp4=True) for size, tile in zip(_SIZES, HALF_BYTES, strict=True)),
    _half_bytes("nvfp4, few rows", HALF_BYTES[0], 16, fp4=True, scales="*fp32"),
    _half_bytes("nvfp4, many rows", HALF_BYTES[2], 16, fp4=True, scales="*fp32"),
]
