"""Experts by own Triton kernels: nothing is read back from the GPU, so that a CUDA graph can hold it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from autodeploy.custom_ops.gpu import Kernel, Tile, Tiles, against_triton, in_other_tiles, power_of_2, tile_for
from autodeploy.custom_ops.moe import moe
from autodeploy.custom_ops.op import Provider
from autodeploy.custom_ops.triton_quantized import ByteRows, HalfByteRows, blocks_for, rounded_rows

FEW, SOME, MANY = Tile(16, 64, 128, 4, 4), Tile(64, 128, 64, 4, 4), Tile(128, 128, 64, 8, 3)
"""For so many rows an expert, in 16 bits. A column is one of the weight: a gate and an up are two."""
FLOAT_FEW, FLOAT_MANY = Tile(16, 64, 32, 4, 2), Tile(64, 64, 32, 8, 2)
"""In float32, without tensor cores."""
DENSE, FLOAT = (FEW, SOME, MANY), (FLOAT_FEW, FLOAT_MANY)
CHUNK, SORT_WARPS, WARP = 4096, 8, 32
"""Places that are looked at together while they are sorted, and by how many warps of how many threads."""
SUM_BLOCK = 1024
_group_rows = Kernel("grouped_gemm", "group_rows")
_grouped_gemm = Kernel("grouped_gemm", "grouped_gemm")
_weighted_sum = Kernel("grouped_gemm", "weighted_sum")


@dataclass(frozen=True)
class Groups:
    """The places of a router's choice [T, k], sorted by expert."""

    tile: Tile
    order: Tensor
    """[T * k] int32: places, by expert."""
    tiles: Tensor
    """[3, tiles] int32, of each run of rows that is multiplied at once: the expert, the first row, the end."""
    top_k: int


@dataclass(frozen=True)
class Matrices:
    """One [N, K] for each expert."""

    form: str
    """As `grouped_gemm` is told: dense, bytes, rounded, int4, fp4."""
    stored: Tensor | ByteRows | HalfByteRows
    """A tensor [E, N, K], or parts of these dims."""

    @property
    def parts(self) -> tuple[Tensor, Tensor | None, Tensor | None, int]:
        """(numbers or codes, scales, offsets, columns that share a scale)."""
        match self.stored:
            case ByteRows(numbers, scales, group):
                return numbers, scales, None, group
            case HalfByteRows(data, scales, offsets, group):
                return data, scales, offsets, group
            case Tensor():
                return self.stored, None, None, 0

    @property
    def shape(self) -> tuple[int, int]:
        """(experts, N)"""
        experts, columns, _ = self.parts[0].shape
        return experts, columns


def triton_moe(
    x: Tensor,
    expert_index: Tensor,
    expert_weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    transposed: bool,
    layout: str,
    activation: str,
    alpha: float,
    limit: float,
    offset: float,
    *,
    tiles: Tiles = DENSE,
) -> Tensor:
    """As `moe`; what is between gate and up stays in float32."""
    if transposed:
        gate_up, down = gate_up.transpose(1, 2), down.transpose(1, 2)
    gate, tiles = (layout, activation, alpha, limit, offset), FLOAT if x.dtype == torch.float32 else tiles
    matrices = Matrices("dense", gate_up), Matrices("dense", down)
    return run_experts(x, expert_index, expert_weights, *matrices, gate_up_bias, down_bias, gate, tiles)


def run_experts(
    x: Tensor,
    expert_index: Tensor,
    expert_weights: Tensor,
    gate_up: Matrices,
    down: Matrices,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    gate: tuple[str, str, float, float, float],
    tiles: Tiles,
) -> Tensor:
    """As `moe`. gate: layout, activation, alpha, limit, offset."""
    x, index, weights = x.contiguous(), expert_index.contiguous(), expert_weights.contiguous()
    (tokens, width), top_k = x.shape, index.shape[1]
    if index.numel() * x.numel() == 0:
        return x.new_zeros(x.shape)
    num_experts, columns = gate_up.shape
    inner = columns if gate[0] == "plain" else columns // 2
    groups = group_rows(index, num_experts, tiles)
    hidden, rows = x.new_empty(index.numel(), inner), x.new_empty(index.numel(), width)
    layout, activation, alpha, limit, offset = gate
    numbers = (layout, activation, float(alpha), float(limit or "inf"), float(offset))
    _multiply(groups, x, gate_up, gate_up_bias, hidden, True, numbers)
    _multiply(groups, hidden, down, down_bias, rows, False, ("plain", "identity", 1.0, 0.0, 0.0))
    out = torch.empty_like(x)
    _weighted_sum[tokens, -(-width // SUM_BLOCK)](rows, index, weights, out, top_k, num_experts, width, BLOCK=SUM_BLOCK)
    return out


def group_rows(index: Tensor, num_experts: int, tiles: Tiles) -> Groups:
    """index [T, k]: which rows each expert multiplies. There is room for the most tiles that there can be."""
    size, tile = index.numel(), tile_for(index.numel() / num_experts, tiles)
    max_tiles = min(size, -(-size // tile.rows) + num_experts)
    order, bounds = index.new_empty(size, dtype=torch.int32), index.new_empty(3, max_tiles, dtype=torch.int32)
    _group_rows[num_experts,](
        index, order, bounds, size, max_tiles, num_experts,
        BLOCK_M=tile.rows, CHUNK=min(CHUNK, max(SORT_WARPS * WARP, power_of_2(size))),
        BINS=power_of_2(max(WARP, num_experts + 1)), num_warps=SORT_WARPS,
    )  # fmt: skip
    return Groups(tile, order, bounds, index.shape[1])


def _multiply(
    groups: Groups,
    x: Tensor,
    matrices: Matrices,
    bias: Tensor | None,
    out: Tensor,
    of_tokens: bool,
    gate: tuple[str, str, float, float, float],
) -> None:
    """out [.., N] = gated(x [.., K] @ a matrix [N or 2 * N, K] + bias); gate: layout, activation, alpha, limit, offset."""
    tile, (layout, activation, *numbers), width = groups.tile, gate, out.shape[1]
    weight, scales, offsets, group = matrices.parts
    codes, x_scales = rounded_rows(x) if matrices.form == "rounded" else (x, None)
    scale_strides = (0, 0) if scales is None else scales.stride()[:2]
    grid = (-(-weight.shape[1] // tile.columns), groups.tiles.shape[1])
    _grouped_gemm[grid](
        codes, x_scales, weight, scales, offsets, bias, out, groups.order, groups.tiles, grid[1], groups.top_k, x.shape[1], width,
        group, x.stride(0), *weight.stride(), *scale_strides, 0 if bias is None else bias.stride(0), out.stride(0), *numbers,
        OF_TOKENS=of_tokens, HAS_BIAS=bias is not None, LAYOUT=layout, ACTIVATION=activation, FORM=matrices.form,
        GROUPED=scales is not None and scales.shape[1] > 1, HAS_OFFSETS=offsets is not None,
        **blocks_for(matrices.stored, tile), **tile.options,
    )  # fmt: skip


def against_experts(
    target: Any,
    x: Tensor,
    expert_weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    **_: Any,
) -> list[str]:
    """The reasons against own Triton kernels for a call of `moe`."""
    if reasons := against_triton(target, x, expert_weights):
        return reasons
    parts = [part for part in (gate_up, down, gate_up_bias, down_bias) if part is not None]
    checks = {
        "its tensors are of several dtypes": any(part.dtype != x.dtype for part in parts),
        "a bias is not one vector an expert": any(part.dim() == 2 and part.stride(1) != 1 for part in parts),
    }
    return [reason for reason, holds in checks.items() if holds]


moe.register(in_other_tiles(Provider("triton", triton_moe, against_experts), DENSE))
