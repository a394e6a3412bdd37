"""Experts of few bits by own Triton kernels, for rows of 16 bits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from autodeploy.custom_ops.gpu import Tile
from autodeploy.custom_ops.linear import against_bytes
from autodeploy.custom_ops.moe import moe
from autodeploy.custom_ops.op import Provider
from autodeploy.custom_ops.triton_moe import Matrices, against_experts, run_experts
from autodeploy.custom_ops.triton_quantized import (
    BYTES,
    HALF_BYTES,
    MIN_GROUP,
    ROUNDED,
    against_columns,
    against_fp4,
    against_fp8,
    against_half_bytes,
    pack_byte_rows,
    pack_fp4_rows,
    pack_half_byte_rows,
)
from autodeploy.formats import Format


def moe_fp4(*call: Any) -> Tensor:
    """As `moe`, of floats of 4 bits; each matrix is rounded to the dtype of the rows."""
    return _run("fp4", HALF_BYTES, *call)


def moe_w4a16(*call: Any) -> Tensor:
    """As `moe_fp4`, of whole numbers."""
    return _run("int4", HALF_BYTES, *call)


def moe_fp8(*call: Any) -> Tensor:
    """As `moe`, of the rows as they are and floats of 8 bits, which are widened."""
    return _run("bytes", BYTES, *call)


def moe_w8a16(*call: Any) -> Tensor:
    """As `moe_fp8`, of whole numbers."""
    return _run("bytes", BYTES, *call)


def moe_w8a8(*call: Any) -> Tensor:
    """As `moe`, each row rounded to 8 bits by a scale of its own, between gate and down too."""
    return _run("rounded", ROUNDED, *call)


def _run(
    form: str,
    tiles: Sequence[Tile],
    x: Tensor,
    expert_index: Tensor,
    expert_weights: Tensor,
    gate_up: Any,
    down: Any,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    transposed: bool,
    *gate: Any,
) -> Tensor:
    matrices = Matrices(form, gate_up), Matrices(form, down)
    return run_experts(x, expert_index, expert_weights, *matrices, gate_up_bias, down_bias, gate, tiles)  # pyright: ignore


def _against(multiple: int, target: Any, x: Tensor, gate_up: Tensor, down: Tensor, transposed: bool, **call: Any) -> list[str]:
    if reasons := against_experts(target, x, gate_up=gate_up, down=down, **call):
        return reasons
    checks = {
        "it has no float32": x.dtype == torch.float32,
        "the experts' inputs come before their outputs": transposed,
    }
    reasons = [reason for reason, holds in checks.items() if holds]
    return reasons or [*dict.fromkeys(against_columns(multiple, gate_up) + against_columns(multiple, down))]


_KINDS: tuple[tuple[str, Callable[..., Tensor], Callable[..., Any], int, Callable[[Format], list[str]]], ...] = (
    ("triton_fp4", moe_fp4, pack_fp4_rows, 2 * MIN_GROUP, against_fp4),
    ("triton_w4a16", moe_w4a16, pack_half_byte_rows, 2 * MIN_GROUP, against_half_bytes),
    ("triton_fp8", moe_fp8, pack_byte_rows, MIN_GROUP, against_fp8),
    ("triton_w8a16", moe_w8a16, pack_byte_rows, MIN_GROUP, partial(against_bytes, rounds=False)),
    ("triton_w8a8", moe_w8a8, pack_byte_rows, MIN_GROUP, partial(against_bytes, rounds=True)),
)
for _name, _moe, _pack, _multiple, _format in _KINDS:
    moe.register(Provider(_name, _moe, partial(_against, _multiple), {"gate_up": _pack, "down": _pack}, _format))
