"""Checkpoints of every quantized format, written from their published layouts: random codes and scales, and what they stand for.

Packing here is arithmetic on whole Python integers, so that it shares nothing with the reader.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0]
NF4 = [
    -1.0,
    -0.6962,
    -0.5251,
    -0.3949,
    -0.2844,
    -0.1848,
    -0.0911,
    0.0,
    0.0796,
    0.1609,
    0.2461,
    0.3379,
    0.4407,
    0.5626,
    0.723,
    1.0,
]
Made = tuple[dict[str, Tensor], Tensor]
"""Stored tensors by what follows the module's name, and the dense matrix in float64."""


@dataclass(frozen=True)
class Producer:
    """One format as one tool writes it."""

    name: str
    settings: dict[str, Any]
    """`quantization_config`."""
    make: Callable[[int, int], Made]
    """(rows, columns) -> a matrix."""


def integers(low: int, high: int, *shape: int) -> Tensor:
    return torch.randint(low, high, shape)


def scales(*shape: int, dtype: torch.dtype = torch.float32, size: float = 0.01) -> Tensor:
    return ((0.5 + torch.rand(shape)) * size).to(dtype)


def words(rows: Sequence[Sequence[int]], bits: int) -> Tensor:
    """Each row as one long number, cut into words of 32 bits, the lowest first."""
    packed = []
    for row in rows:
        number = sum(value << (i * bits) for i, value in enumerate(row))
        count = -(-len(row) * bits // 32)
        packed.append([(number >> (32 * i)) & 0xFFFFFFFF for i in range(count)])
    return torch.tensor(packed, dtype=torch.int64).to(torch.int32)


def pairs(codes: Tensor) -> Tensor:
    """Codes [..., K] of 4 bits, two to a byte, the first in the low half."""
    return (codes[..., 0::2] + 16 * codes[..., 1::2]).to(torch.uint8)


def grouped(few: Tensor, columns: int) -> Tensor:
    """[N, G] -> [N, K]"""
    return torch.stack([few[:, k // (columns // few.shape[1])] for k in range(columns)], dim=1).double()


def blocks(few: Tensor, rows: int, columns: int, size: int = 128) -> Tensor:
    return torch.stack([torch.stack([few[i // size, j // size] for j in range(columns)]) for i in range(rows)]).double()


def fp8(rows: int, columns: int) -> Tensor:
    return torch.randn(rows, columns).mul(4).to(torch.float8_e4m3fn)


def fp8_tensor(rows: int, columns: int, **more: Tensor) -> Made:
    weight, scale = fp8(rows, columns), scales()
    stored = {"weight": weight, "weight_scale": scale, "input_scale": scales(), **more}
    return stored, weight.double() * scale.double()


def fp8_channel(rows: int, columns: int) -> Made:
    weight, scale = fp8(rows, columns), scales(rows)
    return {"weight": weight, "weight_scale": scale}, weight.double() * scale.double()[:, None]


def fp8_block(rows: int, columns: int, suffix: str = "weight_scale_inv", lead: int = 0) -> Made:
    weight, scale = fp8(rows, columns), scales(-(-rows // 128), -(-columns // 128))
    stored = scale.reshape(*[1] * lead, *scale.shape)
    return {"weight": weight, suffix: stored}, weight.double() * blocks(scale, rows, columns)


def mx(rows: int, columns: int, packed: str, four: bool) -> Made:
    codes = integers(0, 16, rows, columns)
    weight = fp8(rows, columns)
    exponent = integers(118, 122, rows, columns // 32)
    numbers = torch.tensor(E2M1)[codes] if four else weight
    dense = numbers.double() * grouped(2.0 ** (exponent.double() - 127), columns)
    return {packed: pairs(codes) if four else weight, "weight_scale": exponent.to(torch.uint8)}, dense


def nvfp4(rows: int, columns: int, modelopt: bool, smoothed: bool = False) -> Made:
    codes, small = integers(0, 16, rows, columns), scales(rows, columns // 16, size=100.0).to(torch.float8_e4m3fn)
    whole = scales(size=1e-4)
    dense = torch.tensor(E2M1)[codes].double() * grouped(small.float(), columns)
    if modelopt:
        stored = {"weight": pairs(codes), "weight_scale": small, "weight_scale_2": whole, "input_scale": scales()}
        dense = dense * whole.double()
    else:
        stored = {"weight_packed": pairs(codes), "weight_scale": small, "weight_global_scale": 1 / whole.reshape(1)}
        dense = dense / stored["weight_global_scale"].double()
        stored["input_global_scale"] = scales(1)
    if smoothed:
        stored["pre_quant_scale"] = scales(columns, size=1.0)
        dense = dense * stored["pre_quant_scale"].double()
    return stored, dense


def modelopt_awq(rows: int, columns: int) -> Made:
    numbers, scale, smooth = integers(-8, 8, rows, columns), scales(rows, columns // 32), scales(columns, size=1.0)
    codes = numbers % 16
    weight = (codes[0::2] + 16 * codes[1::2]).to(torch.uint8)
    return {"weight": weight, "weight_scale": scale, "pre_quant_scale": smooth}, numbers.double() * grouped(
        scale, columns
    ) * smooth.double()


def with_second_scale(made: Made) -> Made:
    """W4A8: how kernels round what the first scales give to 8 bits; the numbers stored do not change by it."""
    stored, dense = made
    return {**stored, "weight_scale_2": torch.tensor(0.37), "input_scale": torch.tensor(0.5)}, dense


def int8_channel(rows: int, columns: int, shape: tuple[int, ...] = (), smoothed: bool = False, zeros: bool = False) -> Made:
    numbers, scale = integers(-128, 128, rows, columns), scales(rows, size=1e-3)
    stored = {"weight": numbers.to(torch.int8), "weight_scale": scale.reshape(rows, *shape)}
    zero = integers(-9, 9, rows) if zeros else torch.zeros(rows)
    if zeros:
        stored["weight_zero_point"] = zero.to(torch.int8)[:, None]
    dense = (numbers - zero[:, None]).double() * scale.double()[:, None]
    if smoothed:
        stored |= {"pre_quant_scale": scales(columns, size=1.0), "input_scale": scales()}
        dense = dense * stored["pre_quant_scale"].double()
    return stored, dense


def ct_packed(rows: int, columns: int, bits: int = 4, group: int = 32, zeros: bool = False, ordered: bool = False) -> Made:
    half = 1 << (bits - 1)
    numbers = integers(-half, half, rows, columns)
    count = columns // group if group else 1
    scale = scales(rows, count, dtype=torch.bfloat16)
    zero = integers(-3, 4, rows, count) if zeros else torch.zeros(rows, count, dtype=torch.int64)
    of_column = torch.randperm(columns) // group if ordered else torch.arange(columns) // (group or columns)
    dense = (numbers - zero[:, of_column]).double() * scale[:, of_column].double()
    stored = {
        "weight_packed": words((numbers + half).tolist(), bits),
        "weight_scale": scale,
        "weight_shape": torch.tensor([rows, columns]),
    }
    if zeros:
        stored["weight_zero_point"] = words((zero + half).T.tolist(), bits).T.contiguous()
    if ordered:
        stored["weight_g_idx"] = of_column.to(torch.int32)
    return stored, dense


def gptq(rows: int, columns: int, bits: int = 4, group: int = 32, ordered: bool = False, second: bool = False) -> Made:
    count = columns // group if group > 0 else 1
    numbers = integers(0, 1 << bits, rows, columns)
    zero, scale = integers(1, 1 << bits, count, rows), scales(count, rows, dtype=torch.float16)
    of_column = torch.randperm(columns) % count if ordered else torch.arange(columns) // (columns // count)
    dense = (numbers - zero.T[:, of_column]).double() * scale.T[:, of_column].double()
    stored = {
        "qweight": words(numbers.tolist(), bits).T.contiguous(),
        "qzeros": words((zero - (0 if second else 1)).tolist(), bits),
        "scales": scale,
        "g_idx": of_column.to(torch.int32),
    }
    return stored, dense


def awq(rows: int, columns: int, group: int = 32) -> Made:
    def eights(numbers: Tensor) -> Tensor:
        """[.., 8 n] -> words: nibble i is the column 8 j + (0, 2, 4, 6, 1, 3, 5, 7)[i]."""
        order = [8 * j + i for j in range(numbers.shape[1] // 8) for i in (0, 2, 4, 6, 1, 3, 5, 7)]
        return words(numbers[:, order].tolist(), 4)

    numbers, zero = integers(0, 16, columns, rows), integers(0, 16, columns // group, rows)
    scale = scales(columns // group, rows, dtype=torch.float16)
    of_column = torch.arange(columns) // group
    dense = ((numbers - zero[of_column]).double() * scale[of_column].double()).T
    return {"qweight": eights(numbers), "qzeros": eights(zero), "scales": scale}, dense


def nf4(rows: int, columns: int, nested: bool) -> Made:
    codes = integers(0, 16, rows * columns)
    count = rows * columns // 64
    absmax, state = scales(count, size=0.1), {"shape": [rows, columns], "dtype": "bfloat16", "blocksize": 64, "quant_type": "nf4"}
    stored = {"weight.absmax": absmax}
    if nested:
        table, of = torch.linspace(-1, 1, 256), integers(0, 256, count)
        outer = scales(-(-count // 256), size=0.05)
        absmax = table[of].double() * torch.stack([outer[i // 256] for i in range(count)]).double() + 0.125
        stored = {"weight.absmax": of.to(torch.uint8), "weight.nested_absmax": outer, "weight.nested_quant_map": table}
        state |= {"nested_blocksize": 256, "nested_offset": 0.125, "nested_dtype": "float32"}
    blob = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    stored |= {
        "weight": (16 * codes[0::2] + codes[1::2]).to(torch.uint8)[:, None],
        "weight.quant_map": torch.tensor(NF4),
        "weight.quant_state.bitsandbytes__nf4": blob,
    }
    numbers = torch.tensor(NF4)[codes].double() * torch.stack([absmax[i // 64] for i in range(len(codes))]).double()
    return stored, numbers.reshape(rows, columns)


def _ct(weights: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {
        "quant_method": "compressed-tensors",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, **more}},
    }


def _modelopt(algorithm: str, **more: Any) -> dict[str, Any]:
    return {"quant_method": "modelopt", "quant_algo": algorithm, "ignore": ["lm_head"], **more}


_GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": False}
PRODUCERS = [
    Producer("modelopt fp8", _modelopt("FP8"), fp8_tensor),
    Producer("modelopt fp8 per channel", _modelopt("FP8_PER_CHANNEL_PER_TOKEN"), fp8_channel),
    Producer("modelopt fp8 per block", _modelopt("FP8_PB_WO"), lambda n, k: fp8_block(n, k, "weight_scale", 1)),
    Producer("modelopt nvfp4", _modelopt("NVFP4", group_size=16), lambda n, k: nvfp4(n, k, True)),
    Producer("modelopt nvfp4 awq", _modelopt("NVFP4_AWQ", group_size=16), lambda n, k: nvfp4(n, k, True, True)),
    Producer("modelopt w4a16 awq", _modelopt("W4A16_AWQ", group_size=32), modelopt_awq),
    Producer("modelopt w4a8 awq", _modelopt("W4A8_AWQ", group_size=32), lambda n, k: with_second_scale(modelopt_awq(n, k))),
    Producer("modelopt w4a8 nvfp4", _modelopt("W4A8_NVFP4_FP8", group_size=16), lambda n, k: nvfp4(n, k, True)),
    Producer("modelopt int8 smoothquant", _modelopt("W8A8_SQ_PER_CHANNEL"), lambda n, k: int8_channel(n, k, smoothed=True)),
    Producer("modelopt mxfp8", _modelopt("MXFP8"), lambda n, k: mx(n, k, "weight", False)),
    Producer("block fp8", {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}, fp8_block),
    Producer("compressed-tensors fp8 tensor", _ct({"num_bits": 8, "type": "float", "strategy": "tensor"}), fp8_tensor),
    Producer(
        "compressed-tensors fp8 block",
        _ct({"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [128, 128]}),
        lambda n, k: fp8_block(n, k, "weight_scale"),
    ),
    Producer("compressed-tensors int8", _ct({"num_bits": 8, "strategy": "channel"}), lambda n, k: int8_channel(n, k, (1,))),
    Producer(
        "compressed-tensors int8 asymmetric",
        _ct({"num_bits": 8, "strategy": "channel", "symmetric": False}),
        lambda n, k: int8_channel(n, k, (1,), zeros=True),
    ),
    Producer("compressed-tensors w4a16", _ct({"num_bits": 4, "group_size": 32, "strategy": "group"}), ct_packed),
    Producer(
        "compressed-tensors w4a16 asymmetric",
        _ct({"num_bits": 4, "group_size": 32, "strategy": "group", "symmetric": False}),
        lambda n, k: ct_packed(n, k, zeros=True),
    ),
    Producer(
        "compressed-tensors w4a16 act-order",
        _ct({"num_bits": 4, "group_size": 32, "strategy": "group", "actorder": "group"}),
        lambda n, k: ct_packed(n, k, ordered=True),
    ),
    Producer("compressed-tensors w3a16", _ct({"num_bits": 3, "strategy": "channel"}), lambda n, k: ct_packed(n, k, 3, 0)),
    Producer(
        "compressed-tensors nvfp4", _ct({"num_bits": 4, "type": "float", "group_size": 16}), lambda n, k: nvfp4(n, k, False)
    ),
    Producer(
        "compressed-tensors mxfp4",
        _ct({"num_bits": 4, "type": "float", "group_size": 32}),
        lambda n, k: mx(n, k, "weight_packed", True),
    ),
    Producer("gptq", _GPTQ, gptq),
    Producer("gptq act-order", {**_GPTQ, "desc_act": True}, lambda n, k: gptq(n, k, ordered=True)),
    Producer("gptq v2", {**_GPTQ, "checkpoint_format": "gptq_v2"}, lambda n, k: gptq(n, k, second=True)),
    Producer("gptq 8 bit, one group", {**_GPTQ, "bits": 8, "group_size": -1}, lambda n, k: gptq(n, k, 8, -1)),
    Producer("awq", {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True}, awq),
    Producer("bitsandbytes nf4", {"quant_method": "bitsandbytes", "load_in_4bit": True}, lambda n, k: nf4(n, k, False)),
    Producer("bitsandbytes nf4 nested", {"quant_method": "bitsandbytes", "load_in_4bit": True}, lambda n, k: nf4(n, k, True)),
]
