"""Experts: rows sorted by expert, a matrix product of each expert's rows with its own matrix, and the weighted sum."""

from dataclasses import replace

import triton
import triton.language as tl

from autodeploy.custom_ops.gpu import Variant
from autodeploy.custom_ops.kernels.few_bits import bytes_product, half_bytes_product
from autodeploy.custom_ops.kernels.gated import activated
from autodeploy.custom_ops.triton_moe import CHUNK, FEW, FLOAT_FEW, FLOAT_MANY, MANY, SOME, SORT_WARPS
from autodeploy.custom_ops.triton_quantized import BYTES, HALF_BYTES, ROUNDED


@triton.jit(do_not_specialize=["size", "max_tiles"])
def group_rows(
    index, order, tiles, size, max_tiles, num_experts,
    BLOCK_M: tl.constexpr, CHUNK: tl.constexpr, BINS: tl.constexpr,
):  # fmt: skip
    """Sort the places of `index` [size] by the expert that they name; one program an expert, BINS > num_experts.

    order [size]: the places, by expert, those that name none left out. tiles [3, max_tiles]: of each run of up to BLOCK_M places
    in `order` of one expert: the expert, the first place, the end; the rest are empty. All are int32, but for the index.
    """
    own = tl.program_id(0)
    bins = tl.arange(0, BINS)
    counts = tl.zeros([BINS], tl.int32)
    for start in range(0, size, CHUNK):
        place = start + tl.arange(0, CHUNK)
        named = tl.load(index + place, place < size, num_experts)
        counts += tl.histogram(tl.where((named >= 0) & (named < num_experts), named, num_experts).to(tl.int32), BINS)
    counts = tl.where(bins < num_experts, counts, 0)
    num_tiles = (counts + BLOCK_M - 1) // BLOCK_M
    first = tl.sum(tl.where(bins < own, counts, 0), 0)
    end = first + tl.sum(tl.where(bins == own, counts, 0), 0)
    first_tile = tl.sum(tl.where(bins < own, num_tiles, 0), 0)

    goal = first
    for start in range(0, size, CHUNK):
        place = start + tl.arange(0, CHUNK)
        is_own = (tl.load(index + place, place < size, num_experts) == own).to(tl.int32)
        tl.store(order + goal + tl.cumsum(is_own, 0) - 1, place, is_own != 0)
        goal += tl.sum(is_own, 0)

    for row in range(first, end, BLOCK_M * BINS):
        rows = row + bins * BLOCK_M
        at = tiles + first_tile + (rows - first) // BLOCK_M
        tl.store(at, own, rows < end)
        tl.store(at + max_tiles, rows, rows < end)
        tl.store(at + 2 * max_tiles, tl.minimum(rows + BLOCK_M, end), rows < end)
    if own == num_experts - 1:
        for tile in range(tl.sum(num_tiles, 0), max_tiles, BINS):
            at = tile + bins
            for part in tl.static_range(3):
                tl.store(tiles + part * max_tiles + at, 0, at < max_tiles)


@triton.jit
def expert_activated(x, alpha, ACTIVATION: tl.constexpr):
    """One of `moe.EXPERT_ACTIVATIONS`, or "swish", of float32."""
    if ACTIVATION == "swish":
        return x * tl.sigmoid(alpha * x)
    elif ACTIVATION == "relu2":
        positive = tl.maximum(x, 0.0)
        return positive * positive
    elif ACTIVATION == "tanh":
        return 2.0 * tl.sigmoid(2.0 * x) - 1.0
    elif ACTIVATION == "identity":
        return x
    else:
        return activated(x, ACTIVATION)


@triton.jit
def weight_columns(tile, width, LAYOUT: tl.constexpr, BLOCK_N: tl.constexpr):
    """(columns of the weight [BLOCK_N] that a program needs, whether each exists); gate and up as the layout has them."""
    lane = tl.arange(0, BLOCK_N)
    if LAYOUT == "halves":
        column = tile * (BLOCK_N // 2) + lane % (BLOCK_N // 2)
        return column + lane // (BLOCK_N // 2) * width, column < width
    elif LAYOUT == "pairs":
        column = tile * BLOCK_N + lane
        return column, column < 2 * width
    else:
        column = tile * BLOCK_N + lane
        return column, column < width


@triton.jit
def gated(total, alpha, limit, offset, LAYOUT: tl.constexpr, ACTIVATION: tl.constexpr):
    """As `moe.gate_experts`, of the columns of `weight_columns` in float32; a limit of infinity is none."""
    BLOCK_M: tl.constexpr = total.shape[0]
    HALF: tl.constexpr = total.shape[1] // 2
    if LAYOUT == "plain":
        return expert_activated(total, alpha, ACTIVATION)
    else:
        if LAYOUT == "halves":
            gate, up = tl.split(tl.permute(tl.reshape(total, (BLOCK_M, 2, HALF)), (0, 2, 1)))
        else:
            gate, up = tl.split(tl.reshape(total, (BLOCK_M, HALF, 2)))
        gate = tl.where(gate > limit, limit, gate)
        up = tl.where(up > limit, limit, tl.where(up < -limit, -limit, up))
        return expert_activated(gate, alpha, ACTIVATION) * (up + offset)


@triton.jit
def dense_product(
    x_at, is_row, weight_at, is_column, depth_stride, x_width,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """[rows, columns] in float32: x_at [BLOCK_M, BLOCK_K] by weight_at [BLOCK_K, BLOCK_N]."""
    step = tl.arange(0, BLOCK_K)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, x_width, BLOCK_K):
        is_step = start + step < x_width
        rows = tl.load(x_at, is_row[:, None] & is_step[None, :], 0.0)
        columns = tl.load(weight_at, is_step[:, None] & is_column[None, :], 0.0)
        total = tl.dot(rows, columns, total, input_precision="ieee")
        x_at += BLOCK_K
        weight_at += BLOCK_K * depth_stride
    return total


@triton.jit(do_not_specialize=["max_tiles"])
def grouped_gemm(
    x, x_scales, weight, scales, offsets, bias, out, order, tiles, max_tiles, top_k, x_width, out_width, group,
    x_stride, expert_stride, column_stride, depth_stride, scales_expert_stride, scales_stride, bias_stride, out_stride,
    alpha, limit, offset,
    OF_TOKENS: tl.constexpr, HAS_BIAS: tl.constexpr, LAYOUT: tl.constexpr, ACTIVATION: tl.constexpr,
    FORM: tl.constexpr, GROUPED: tl.constexpr, HAS_OFFSETS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out [.., out_width] = gated(x [.., x_width] @ weight of its expert + bias); a program makes a tile of `group_rows`.

    OF_TOKENS: row order[i] // top_k of x goes to row i of out; otherwise row i goes to row order[i]. FORM: the weight is "dense",
    or its rows lie one after the other, of "bytes" (of "rounded" ones, x is int8 with x_scales too), or of two numbers a byte:
    "int4" or "fp4". Scales and offsets are [experts, groups, columns of the weight]; GROUPED: there is more than one group.
    """
    expert = tl.load(tiles + tl.program_id(1)).to(tl.int64)
    first, end = tl.load(tiles + max_tiles + tl.program_id(1)), tl.load(tiles + 2 * max_tiles + tl.program_id(1))
    if first >= end:
        return
    row = first + tl.arange(0, BLOCK_M)
    is_row = row < end
    place = tl.load(order + row, is_row, 0)
    source = place // top_k if OF_TOKENS else row
    goal = row if OF_TOKENS else place
    column, is_column = weight_columns(tl.program_id(0), out_width, LAYOUT, BLOCK_N)  # pyright: ignore
    step = tl.arange(0, BLOCK_K)
    x_rows = x + source.to(tl.int64) * x_stride
    weight_rows = weight + expert * expert_stride + column.to(tl.int64) * column_stride
    if FORM == "dense":
        x_at, weight_at = x_rows[:, None] + step[None, :], weight_rows[None, :] + step[:, None] * depth_stride
        total = dense_product(x_at, is_row, weight_at, is_column, depth_stride, x_width, BLOCK_M, BLOCK_N, BLOCK_K)
    else:
        x_at, weight_at = x_rows[None, :] + step[:, None], weight_rows[:, None] + step[None, :]
        scales_at = scales + expert * scales_expert_stride + column
        if FORM == "bytes" or FORM == "rounded":
            total = bytes_product(
                x_at, is_row, weight_at, is_column, scales_at, scales_stride, x_width, group,
                FORM == "rounded", GROUPED, BLOCK_M, BLOCK_N, BLOCK_K,
            )  # fmt: skip
            if not GROUPED:
                total *= tl.load(scales_at, is_column, 0.0)[:, None]
            if FORM == "rounded":
                total *= tl.load(x_scales + source, is_row, 0.0)[None, :]
        else:
            offsets_at = offsets + expert * scales_expert_stride + column if HAS_OFFSETS else scales_at
            total = half_bytes_product(
                x_at, is_row, weight_at, is_column, scales_at, offsets_at, scales_stride, x_width, group,
                FORM == "fp4", HAS_OFFSETS, BLOCK_M, BLOCK_N, BLOCK_K,
            )  # fmt: skip
        total = tl.trans(total)
    if HAS_BIAS:
        total += tl.load(bias + expert * bias_stride + column, is_column, 0.0).to(tl.float32)[None, :]
    value = gated(total, alpha, limit, offset, LAYOUT, ACTIVATION)
    OUTPUTS: tl.constexpr = value.shape[1]
    output = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    out_at = out + goal.to(tl.int64)[:, None] * out_stride + output[None, :]
    tl.store(out_at, value.to(out.dtype.element_ty), is_row[:, None] & (output < out_width)[None, :])


@triton.jit
def weighted_sum(x, index, weights, out, top_k, num_experts, width, BLOCK: tl.constexpr):
    """out [T, width] = sum over k, in order and in float32, of weights [T, k] * x [T * k, width]; without places of no expert."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for place in range(token * top_k, (token + 1) * top_k):
        named = tl.load(index + place)
        is_chosen = (named >= 0) & (named < num_experts)
        value = tl.load(x + place * width + column, is_chosen & (column < width), 0.0).to(tl.float32)
        total += tl.load(weights + place, is_chosen, 0.0).to(tl.float32) * value
    tl.store(out + token * width + column, total.to(out.dtype.element_ty), column < width)


def _variant(label, tile, number="*bf16", must=(), max_registers=255, transposed=False, **constants):
    """One of `grouped_gemm`."""
    types = {"order": "*i32", "tiles": "*i32", "alpha": "fp32", "limit": "fp32", "offset": "fp32"}
    plain = {"OF_TOKENS": True, "HAS_BIAS": False, "LAYOUT": "halves", "ACTIVATION": "silu"}
    plain |= {"FORM": "dense", "GROUPED": False, "HAS_OFFSETS": False}
    near = {"column_stride" if transposed else "depth_stride": 1}
    types |= dict.fromkeys(("x", "weight", "bias", "out"), number)
    constants = plain | near | tile.blocks | constants
    return Variant(grouped_gemm, label, types, constants, **tile.options, max_registers=max_registers, must=must)


def _few_bits(label, tile, form, weight, block=0, scales="*fp32", **constants):
    """One of `grouped_gemm` whose matrices are of few bits; block: of how many columns a group is, 0 for all."""
    must = ("IGMMA" if form == "rounded" else "HGMMA", "LDGSTS")
    found = _variant(label, tile, must=must, FORM=form, GROUPED=block > 0, **constants)
    x = "*i8" if form == "rounded" else "*bf16"
    types = {**found.types, "x": x, "x_scales": "*fp32", "weight": weight, "scales": scales, "offsets": scales}
    return replace(found, types=types, constants={**found.constants, "BLOCK_K": min(block or tile.depth, tile.depth)})


_DOWN = {"OF_TOKENS": False, "LAYOUT": "plain", "ACTIVATION": "identity"}
_PAIRS_OF_ROWS = {"LAYOUT": "pairs", "ACTIVATION": "swish", "HAS_BIAS": True}
_PAIRS = {**_PAIRS_OF_ROWS, "transposed": True}
VARIANTS = [
    *(
        Variant(
            group_rows,
            f"{experts} experts",
            {"index": "*i64", "order": "*i32", "tiles": "*i32"},
            {"BLOCK_M": 128, "CHUNK": CHUNK, "BINS": 2 * experts},
            num_warps=SORT_WARPS,
            max_registers=128,
        )
        for experts in (128, 512)
    ),
    _variant("bf16, few rows, halves", FEW, must=("HMMA", "LDGSTS"), max_registers=128),
    _variant("bf16, few rows, down", FEW, must=("HMMA", "LDGSTS"), max_registers=128, **_DOWN),
    _variant("bf16, few rows, pairs, transposed, biases", FEW, must=("HMMA", "LDGSTS"), max_registers=128, **_PAIRS),
    _variant("bf16, some rows, halves", SOME, must=("HGMMA", "LDGSTS")),
    _variant("bf16, many rows, halves", MANY, must=("HGMMA", "LDGSTS")),
    _variant("bf16, many rows, down", MANY, must=("HGMMA", "LDGSTS"), **_DOWN),
    _variant("bf16, many rows, pairs, transposed, biases", MANY, must=("HGMMA", "LDGSTS"), **_PAIRS),
    *(
        variant
        for size, byte, half, rounded in zip(("few rows", "many rows"), BYTES[::2], HALF_BYTES[::2], ROUNDED[::2], strict=True)
        for variant in (
            _few_bits(f"fp8, {size}, halves", byte, "bytes", "*fp8e4nv"),
            _few_bits(f"fp8 by 128, {size}, halves", byte, "bytes", "*fp8e4nv", 128),
            _few_bits(f"int8, {size}, halves", byte, "bytes", "*i8"),
            _few_bits(f"int8, rounded, {size}, halves", rounded, "rounded", "*i8"),
            _few_bits(f"int4 by 128, {size}, halves", half, "int4", "*u8", 128, "*bf16"),
            _few_bits(f"int4 by 32, zero points, {size}, down", half, "int4", "*u8", 32, "*bf16", HAS_OFFSETS=True, **_DOWN),
            _few_bits(f"mxfp4, {size}, pairs, biases", half, "fp4", "*u8", 32, "*bf16", **_PAIRS_OF_ROWS),
            _few_bits(f"nvfp4, {size}, down", half, "fp4", "*u8", 16, **_DOWN),
        )
    ),
    _variant("fp32, few rows, halves", FLOAT_FEW, "*fp32"),
    _variant("fp32, many rows, halves", FLOAT_MANY, "*fp32"),
    Variant(
        weighted_sum,
        "bf16, 1,024",
        {"x": "*bf16", "index": "*i64", "weights": "*bf16", "out": "*bf16"},
        {"BLOCK": 1024},
        max_registers=64,
    ),
]
