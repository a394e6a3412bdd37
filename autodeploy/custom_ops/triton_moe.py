"""Experts by own Triton kernels: nothing is read back from the GPU, so that a CUDA graph can hold it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from autodeploy.custom_ops.gpu import Kernel, Tile, Tiles, against_triton, in_other_tiles, power_of_2, tile_for
from autodeploy.custom_ops.moe import moe
from autodeploy.custom_ops.op import Provider

FEW, SOME, MANY = Tile(16, 64, 128, 4, 4), Tile(64, 128, 64, 4, 4), Tile(128, 128, 64, 8, 3)
TILES = (FEW, SOME, MANY)
"""For so many rows an expert, in 16 bits. A column is one of the weight: a gate and an up are two."""
FLOAT_FEW, FLOAT_MANY = Tile(16, 64, 32, 4, 2), Tile(64, 64, 32, 8, 2)
"""In float32, without tensor cores."""
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
    tiles: Tiles = TILES,
) -> Tensor:
    """As `moe`; what is between gate and up stays in float32."""
    x, index, weights = x.contiguous(), expert_index.contiguous(), expert_weights.contiguous()
    (tokens, width), top_k = x.shape, index.shape[1]
    if index.numel() * x.numel() == 0:
        return x.new_zeros(x.shape)
    groups = group_rows(index, len(down), (FLOAT_FEW, FLOAT_MANY) if x.dtype == torch.float32 else tiles)
    if transposed:
        gate_up, down = gate_up.transpose(1, 2), down.transpose(1, 2)
    hidden, rows = x.new_empty(index.numel(), down.shape[2]), x.new_empty(index.numel(), width)
    gate = (layout, activation, float(alpha), float(limit or "inf"), float(offset))
    _multiply(groups, x, gate_up, gate_up_bias, hidden, True, gate)
    _multiply(groups, hidden, down, down_bias, rows, False, ("plain", "identity", 1.0, 0.0, 0.0))
    out = torch.empty_like(x)
    _weighted_sum[tokens, -(-width // SUM_BLOCK)](rows, index, weights, out, top_k, len(down), width, BLOCK=SUM_BLOCK)
    return out


def group_rows(index: Tensor, num_experts: int, tiles_by_rows: Tiles) -> Groups:
    """index [T, k]: which rows each expert multiplies. There is room for the most tiles that there can be."""
    size, tile = index.numel(), tile_for(index.numel() / num_experts, tiles_by_rows)
    max_tiles = min(size, -(-size // tile.rows) + num_experts)
    order, tiles = index.new_empty(size, dtype=torch.int32), index.new_empty(3, max_tiles, dtype=torch.int32)
    _group_rows[num_experts,](
        index, order, tiles, size, max_tiles, num_experts,
        BLOCK_M=tile.rows, CHUNK=min(CHUNK, max(SORT_WARPS * WARP, power_of_2(size))),
        BINS=power_of_2(max(WARP, num_experts + 1)), num_warps=SORT_WARPS,
    )  # fmt: skip
    return Groups(tile, order, tiles, index.shape[1])


def _multiply(
    groups: Groups,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    out: Tensor,
    of_tokens: bool,
    gate: tuple[str, str, float, float, float],
) -> None:
    """out [.., N] = gated(x [.., K] @ weight [E, N or 2 * N, K] + bias); gate: layout, activation, alpha, limit, offset."""
    tile, (layout, activation, *numbers), width = groups.tile, gate, out.shape[1]
    expert_stride, column_stride, depth_stride = weight.stride()
    grid = (-(-weight.shape[1] // tile.columns), groups.tiles.shape[1])
    _grouped_gemm[grid](
        x, weight, bias, out, groups.order, groups.tiles, grid[1], groups.top_k, x.shape[1], width,
        x.stride(0), expert_stride, column_stride, depth_stride, 0 if bias is None else bias.stride(0), out.stride(0), *numbers,
        OF_TOKENS=of_tokens, HAS_BIAS=bias is not None, LAYOUT=layout, ACTIVATION=activation, **tile.blocks, **tile.options,
    )  # fmt: skip


def _against(
    target: Any,
    x: Tensor,
    expert_weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    **_: Any,
) -> list[str]:
    if reasons := against_triton(target, x, expert_weights):
        return reasons
    parts = [part for part in (gate_up, down, gate_up_bias, down_bias) if part is not None]
    checks = {
        "its tensors are of several dtypes": any(part.dtype != x.dtype for part in parts),
        "a bias is not one vector an expert": any(part.dim() == 2 and part.stride(1) != 1 for part in parts),
    }
    return [reason for reason, holds in checks.items() if holds]


moe.register(in_other_tiles(Provider("triton", triton_moe, _against), TILES))
