"""Norm, rotary embedding and gated activation: one op each, exact to the order of casts in the models they were found in."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from autodeploy.custom_ops.op import semantic_op

ACTIVATIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "sigmoid": torch.sigmoid,
}


def _like_first(x: Tensor, *_: object) -> Tensor:
    """Shape rule of all these: as the first argument, in shape, dtype and layout."""
    return torch.empty_like(x)


def _two_like_first(x: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(x)


@semantic_op(fake=_like_first)
def rms_norm(x: Tensor, weight: Tensor | None, eps: float, offset: float, weight_in_float: bool) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * (offset + weight) over the last dim; x [..., C], weight [C] or None.

    The statistics are in float32 (float64 for float64). weight_in_float: the weight is applied before the result is
    rounded to x's dtype (Gemma), not after it (Llama).
    """
    wide = x.float() if x.dtype != torch.float64 else x
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weighted(normed, x.dtype, weight, offset, weight_in_float)


def weighted(normed: Tensor, dtype: torch.dtype, weight: Tensor | None, offset: float, weight_in_float: bool) -> Tensor:
    """The end of `rms_norm`: the weight, and the rounding to the dtype of what is normed."""
    if weight is None:
        return normed.to(dtype)
    if weight_in_float:
        return (normed * (offset + weight.to(normed.dtype))).to(dtype)
    return (offset + weight if offset else weight) * normed.to(dtype)


@semantic_op(fake=_two_like_first)
def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, offset: float, weight_in_float: bool
) -> tuple[Tensor, Tensor]:
    """(sum, rms_norm(sum)) of sum = x + residual, rounded to their dtype; x and residual [..., C], of one layout."""
    total = x + residual
    return total, rms_norm.reference(total, weight, eps, offset, weight_in_float)


@semantic_op(fake=_like_first)
def rope(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """x * cos + rotated(x) * sin; x [1, H, T, D] (any layout), cos and sin broadcast against it.

    rotated: (-second half, first half) of the last dim, or pairwise (-odd, even) when interleaved.
    """
    if interleaved:
        rotated = torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
    else:
        half = x.shape[-1] // 2
        rotated = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    return x * cos + rotated * sin


@semantic_op(fake=_like_first)
def gated_activation(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """activation(gate) * up, elementwise; the activation is a key of `ACTIVATIONS`."""
    return ACTIVATIONS[activation](gate) * up


@semantic_op(fake=_like_first)
def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """(x - mean) / sqrt(var + eps) * weight + bias over the last dim; weight and bias broadcast against x ([C], or [H, C])."""
    wide = x.float() if x.dtype != torch.float64 else x
    normed = F.layer_norm(wide, wide.shape[-1:], None, None, eps)
    if weight is not None:
        normed = normed * weight.to(normed.dtype)
    if bias is not None:
        normed = normed + bias.to(normed.dtype)
    return normed.to(x.dtype)
