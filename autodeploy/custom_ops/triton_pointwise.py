"""The ops of `pointwise` by own Triton kernels."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from autodeploy.custom_ops import layouts, pointwise
from autodeploy.custom_ops.gpu import Kernel, against_triton, power_of_2
from autodeploy.custom_ops.layouts import rows_of
from autodeploy.custom_ops.op import Provider

MAX_WIDTH = 1 << 15
"""Numbers of a row that a program keeps in registers."""
GATED_BLOCK, WARP_NUMBERS = 1024, 512
"""Numbers of a program, of a warp."""
_rms_norm = Kernel("norm", "rms_norm")
_layer_norm = Kernel("norm", "layer_norm")
_gated_activation = Kernel("gated", "gated_activation")


def rms_norm(x: Tensor, weight: Tensor | None, eps: float, offset: float, weight_in_float: bool) -> Tensor:
    """x [T, C], [B, T, C] or [1, T, H, C] with any strides but the last."""
    out = torch.empty_like(x)
    _norm_rows(x, None, weight, None, out, eps, offset, weight_in_float)
    return out


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, offset: float, weight_in_float: bool
) -> tuple[Tensor, Tensor]:
    """x and residual [..., C], contiguous."""
    total, out = torch.empty_like(x), torch.empty_like(x)
    _norm_rows(x, residual, weight, total, out, eps, offset, weight_in_float)
    return total, out


def _norm_rows(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    total: Tensor | None,
    out: Tensor,
    eps: float,
    offset: float,
    in_float: bool,
) -> None:
    outer, inner, width, *strides = rows_of(x, out)
    if outer * inner:
        _rms_norm[outer * inner,](
            x, residual, weight, total, out, inner, width, *strides, eps, offset,
            HAS_RESIDUAL=residual is not None, HAS_WEIGHT=weight is not None, IN_FLOAT=in_float,
            BLOCK=power_of_2(width), num_warps=warps_for(width),
        )  # fmt: skip


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """x [..., C], contiguous; weight and bias [C]."""
    out, width = torch.empty_like(x), x.shape[-1]
    if x.numel():
        _layer_norm[x.numel() // width,](
            x, weight, bias, out, width, eps,
            HAS_WEIGHT=weight is not None, HAS_BIAS=bias is not None, BLOCK=power_of_2(width), num_warps=warps_for(width),
        )  # fmt: skip
    return out


def gated_activation(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """gate and up: rows [.., T, C] with any stride from one to the next."""
    out, width = torch.empty_like(gate), gate.shape[-1]
    if gate.numel():
        grid = (gate.numel() // width, -(-width // GATED_BLOCK))
        _gated_activation[grid](
            gate, up, out, width, gate.stride(-2), up.stride(-2), ACTIVATION=activation, BLOCK=min(GATED_BLOCK, power_of_2(width))
        )
    return out


def warps_for(width: int) -> int:
    """Of a program that keeps that many numbers."""
    return max(1, min(16, power_of_2(width) // WARP_NUMBERS))


def _against(target: Any, x: Tensor, *others: Tensor | None) -> list[str]:
    if reasons := against_triton(target, x, *others):
        return reasons
    wide = [f"a row has more than {MAX_WIDTH} numbers"] if x.shape[-1] > MAX_WIDTH else []
    mixed = any(tensor is not None and tensor.dtype != x.dtype for tensor in others)
    return wide + (["its tensors are of several dtypes"] if mixed else [])


pointwise.rms_norm.register(Provider("triton", rms_norm, partial(layouts.against_rms_norm, _against)))
pointwise.add_rms_norm.register(Provider("triton", add_rms_norm, partial(layouts.against_add_rms_norm, _against)))
pointwise.layer_norm.register(Provider("triton", layer_norm, partial(layouts.against_layer_norm, _against)))
pointwise.gated_activation.register(Provider("triton", gated_activation, partial(layouts.against_gated_activation, _against)))
