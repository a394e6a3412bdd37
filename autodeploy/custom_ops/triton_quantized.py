"""Linear layers of whole numbers by own Triton kernels, for rows of 16 bits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from math import gcd
from typing import Any

import torch
from torch import Tensor

from autodeploy.custom_ops.gpu import Kernel, Tile, Tiles, against_triton, in_other_tiles, power_of_2, tile_for
from autodeploy.custom_ops.linear import against_bytes, linear_op
from autodeploy.custom_ops.op import Provider
from autodeploy.custom_ops.triton_pointwise import warps_for
from autodeploy.formats import Format, Integers

MAX_INPUTS = 1 << 16
"""Columns whose sum of products of bytes is sure to fit in 32 bits, and that a program keeps in registers."""
MIN_GROUP = 16
"""Columns that tensor cores add up at once."""
ROUNDED = (Tile(16, 64, 128, 4, 4), Tile(64, 128, 128, 4, 4), Tile(128, 128, 128, 8, 3))
BYTES = (Tile(16, 64, 128, 4, 4), Tile(64, 128, 64, 4, 4), Tile(128, 128, 64, 8, 3))
HALF_BYTES = (Tile(16, 64, 64, 4, 5), Tile(64, 64, 64, 4, 4), Tile(128, 128, 32, 8, 4))
_quantize_rows = Kernel("quantized_gemm", "quantize_rows")
_bytes_gemm = Kernel("quantized_gemm", "bytes_gemm")
_half_bytes_gemm = Kernel("quantized_gemm", "half_bytes_gemm")


@dataclass(frozen=True, slots=True)
class ByteRows:
    """A matrix [N, K] of bytes."""

    numbers: Tensor
    """[N, K] int8 or float8_e4m3fn."""
    scales: Tensor
    """[groups, N] float32."""
    group: int
    """Columns that share a scale."""

    @property
    def nbytes(self) -> int:
        return self.numbers.nbytes + self.scales.nbytes


@dataclass(frozen=True, slots=True)
class HalfByteRows:
    """A matrix [N, K] of four bits, K even."""

    data: Tensor
    """[N, K / 2] uint8: 8 more than the numbers, the first half of the columns in the low bits."""
    scales: Tensor
    """[groups, N], bfloat16 where that is exact, else float32."""
    offsets: Tensor | None
    """The same: what the stored numbers are too large by; None: by 8."""
    group: int
    """Columns that share a scale."""

    @property
    def nbytes(self) -> int:
        return self.data.nbytes + self.scales.nbytes + (0 if self.offsets is None else self.offsets.nbytes)


def pack_byte_rows(weight: Integers, call: Mapping[str, Any] | None = None) -> ByteRows:
    """weight: [N, K], a scale to each row, or to each power of two of its columns; no zero points."""
    return ByteRows(weight.numbers.contiguous(), weight.scales.T.contiguous(), _group_size(weight))


def pack_half_byte_rows(weight: Integers, call: Mapping[str, Any] | None = None) -> HalfByteRows:
    """weight: [N, K] of four bits, a scale to each group of a row: all of it, or a power of two of columns."""
    low, high = (weight.numbers + 8).view(torch.uint8).chunk(2, dim=1)
    offsets = None if weight.zeros is None else _shortest((weight.zeros + 8).T.contiguous())
    return HalfByteRows((low | high << 4).contiguous(), _shortest(weight.scales.T.contiguous()), offsets, _group_size(weight))


def _group_size(weight: Integers) -> int:
    """Columns that share a scale: all, or a power of two; the last group may be a part of one."""
    num_inputs, groups = weight.numbers.shape[1], weight.scales.shape[1]
    return num_inputs if groups == 1 else power_of_2(-(-num_inputs // groups))


def _shortest(numbers: Tensor) -> Tensor:
    short = numbers.bfloat16()
    return short if torch.equal(short.float(), numbers) else numbers


def linear_w8a8(x: Tensor, weight: ByteRows, bias: Tensor | None = None, *, tiles: Tiles = ROUNDED) -> Tensor:
    """As `linear`, each row of x rounded to 8 bits by a scale of its own."""
    x, width = x.contiguous(), x.shape[-1]
    rows = x.numel() // width
    codes, scales = torch.empty_like(x, dtype=torch.int8), x.new_empty(rows, dtype=torch.float32)
    if rows:
        _quantize_rows[rows,](x, codes, scales, width, BLOCK=power_of_2(width), num_warps=warps_for(width))
    return _multiply_bytes(tiles, x, codes, scales, weight, bias)


def linear_w8a16(x: Tensor, weight: ByteRows, bias: Tensor | None = None, *, tiles: Tiles = BYTES) -> Tensor:
    """As `linear`, of the rows as they are."""
    x = x.contiguous()
    return _multiply_bytes(tiles, x, x, None, weight, bias)


def linear_fp8(x: Tensor, weight: ByteRows, bias: Tensor | None = None, *, tiles: Tiles = BYTES) -> Tensor:
    """As `linear`, of the rows as they are and floats of 8 bits, which are widened."""
    x = x.contiguous()
    return _multiply_bytes(tiles, x, x, None, weight, bias)


def _multiply_bytes(
    tiles: Tiles, x: Tensor, codes: Tensor, x_scales: Tensor | None, weight: ByteRows, bias: Tensor | None
) -> Tensor:
    """x [..., K] -> [..., N] of its dtype; codes: x as the kernel reads it."""
    num_outputs, num_inputs = weight.numbers.shape
    out, rows = x.new_empty((*x.shape[:-1], num_outputs)), x.numel() // num_inputs
    if rows:
        tile, is_grouped = tile_for(rows, tiles), len(weight.scales) > 1
        blocks = {**tile.blocks, "BLOCK_K": gcd(weight.group, tile.depth)} if is_grouped else tile.blocks
        _bytes_gemm[_grid(tile, rows, num_outputs)](
            codes, x_scales, weight.numbers, weight.scales, bias, out, rows, num_inputs, num_outputs, weight.group,
            ROUNDED=x_scales is not None, GROUPED=is_grouped, HAS_BIAS=bias is not None, **blocks, **tile.options,
        )  # fmt: skip
    return out


def linear_w4a16(x: Tensor, weight: HalfByteRows, bias: Tensor | None = None, *, tiles: Tiles = HALF_BYTES) -> Tensor:
    """As `linear`, of the rows as they are; the matrix is rounded to their dtype."""
    x, (num_outputs, half) = x.contiguous(), weight.data.shape
    out, rows = x.new_empty((*x.shape[:-1], num_outputs)), x.numel() // (2 * half)
    if rows:
        tile = tile_for(rows, tiles)
        blocks = {**tile.blocks, "BLOCK_K": gcd(half, weight.group, tile.depth)}
        _half_bytes_gemm[_grid(tile, rows, num_outputs)](
            x, weight.data, weight.scales, weight.offsets, bias, out, rows, 2 * half, num_outputs, weight.group,
            HAS_OFFSETS=weight.offsets is not None, HAS_BIAS=bias is not None, **blocks, **tile.options,
        )  # fmt: skip
    return out


def _grid(tile: Tile, rows: int, num_outputs: int) -> tuple[int, int]:
    return -(-num_outputs // tile.columns), -(-rows // tile.rows)


def _against_fp8(form: Format) -> list[str]:
    group = form.block[1]
    checks = {
        f"the weights are {form.name}": not form.is_fp8,
        f"groups of {group} columns are no power of 2 from {MIN_GROUP} on": group > 0
        and max(MIN_GROUP, power_of_2(group)) != group,
    }
    return [reason for reason, holds in checks.items() if holds]


def _against_half_bytes(form: Format) -> list[str]:
    group = form.block[1]
    checks = {
        f"the weights are {form.name}": not form.is_integers or form.bits != 4,
        f"groups of {group} columns are no power of 2 from {MIN_GROUP} on": group > 0
        and max(MIN_GROUP, power_of_2(group)) != group,
    }
    return [reason for reason, holds in checks.items() if holds]


def _against_linear(multiple: int, target: Any, input: Tensor, weight: Tensor, bias: Tensor | None) -> list[str]:
    if reasons := against_triton(target, input):
        return reasons
    columns = weight.shape[-1]
    checks = {
        "it has no float32": input.dtype == torch.float32,
        "its tensors are of several dtypes": weight.dtype != input.dtype or (bias is not None and bias.dtype != input.dtype),
        f"{columns} columns are no multiple of {multiple} up to {MAX_INPUTS}": columns % multiple > 0 or columns > MAX_INPUTS,
    }
    return [reason for reason, holds in checks.items() if holds]


_KINDS: tuple[tuple[str, Callable[..., Tensor], Tiles, Callable[..., Any], int, Callable[[Format], list[str]]], ...] = (
    ("triton_w4a16", linear_w4a16, HALF_BYTES, pack_half_byte_rows, 2 * MIN_GROUP, _against_half_bytes),
    ("triton_fp8", linear_fp8, BYTES, pack_byte_rows, 16, _against_fp8),
    ("triton_w8a16", linear_w8a16, BYTES, pack_byte_rows, 16, partial(against_bytes, rounds=False)),
    ("triton_w8a8", linear_w8a8, ROUNDED, pack_byte_rows, 16, partial(against_bytes, rounds=True)),
)
for _name, _linear, _tiles, _pack, _multiple, _against in _KINDS:
    _provider = Provider(_name, _linear, partial(_against_linear, _multiple), {"weight": _pack}, _against)
    linear_op.register(in_other_tiles(_provider, _tiles))
