"""Which layouts of pointwise ops own kernels can work on, on any device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from autodeploy.custom_ops import pointwise

MAX_HEAD_DIM = 1024
"""Numbers of a head that own kernels turn, or read from a cache."""
Against = Callable[..., list[str]]
"""(target, *tensors) -> the reasons against that target, and tensors of such dtypes."""


def rows_of(x: Tensor, out: Tensor) -> tuple[int, int, int, int, int, int, int]:
    """Sizes of [outer, inner, width], and the strides of the first two in x and in out."""
    if x.is_contiguous():
        width = x.shape[-1]
        return 1, x.numel() // width, width, 0, width, 0, width
    outer, inner, width = (1, *x.shape)[-3:]
    x_outer, x_inner, _ = (0, *x.stride())[-3:]
    out_outer, out_inner, _ = (0, *out.stride())[-3:]
    return outer, inner, width, x_outer, x_inner, out_outer, out_inner


def _against_vectors(x: Tensor, *vectors: Tensor | None) -> list[str]:
    fits = all(vector is None or vector.shape == x.shape[-1:] for vector in vectors)
    return [] if fits else ["the weight or bias is not one vector"]


def _against_layout(*tensors: Tensor) -> list[str]:
    return [] if all(tensor.is_contiguous() for tensor in tensors) else ["its input is not contiguous"]


def against_rms_norm(against: Against, target: Any, x: Tensor, weight: Tensor | None, **_: Any) -> list[str]:
    in_two_dims = 2 <= x.dim() <= 3 or (x.dim() == 4 and x.shape[0] == 1) or x.is_contiguous()
    reasons = [] if in_two_dims and x.stride(-1) == 1 else ["the rows are not in two dims, or their numbers not neighbours"]
    return against(target, x, weight) + reasons + _against_vectors(x, weight)


def against_add_rms_norm(
    against: Against, target: Any, x: Tensor, residual: Tensor, weight: Tensor | None, **_: Any
) -> list[str]:
    return against(target, x, residual, weight) + _against_layout(x, residual) + _against_vectors(x, weight)


def against_layer_norm(
    against: Against, target: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> list[str]:
    return against(target, x, weight, bias) + _against_layout(x) + _against_vectors(x, weight, bias)


def against_rope(against: Against, target: Any, x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> list[str]:
    checks = {
        "x is not [1, H, T, D] with an even D": x.dim() != 4 or x.shape[0] != 1 or x.shape[-1] % 2 != 0,
        "the numbers of a row are not neighbours": x.stride(-1) != 1,
        "cos or sin is not [1, T, D]": any(
            angle.shape[-2:] != x.shape[-2:] or any(size != 1 for size in angle.shape[:-2]) for angle in (cos, sin)
        ),
    }
    return against(target, x, cos, sin) + _against_layout(cos, sin) + [reason for reason, holds in checks.items() if holds]


def against_gated_activation(against: Against, target: Any, gate: Tensor, up: Tensor, activation: str) -> list[str]:
    checks = {
        f"it has no {activation}": activation not in pointwise.ACTIVATIONS,
        "gate and up differ in shape": gate.shape != up.shape,
        "the rows are not in one dim, or their numbers not neighbours": not (_has_rows(gate) and _has_rows(up)),
    }
    return against(target, gate, up) + [reason for reason, holds in checks.items() if holds]


def _has_rows(x: Tensor) -> bool:
    """x is rows with the same stride from each to the next."""
    in_one_dim = all(size == 1 for size in x.shape[:-2])
    return x.dim() >= 2 and x.stride(-1) == 1 and (in_one_dim or x.is_contiguous())


def against_turning(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, q_weight: Tensor | None, k_weight: Tensor | None
) -> list[str]:
    """The reasons against the layout of what `rope_append` is given."""
    checks = {
        "the numbers of a head are not neighbours": any(x.stride(-1) != 1 for x in (q, k, v)),
        f"a head has more than {MAX_HEAD_DIM} numbers, or an odd number": q.shape[3] > MAX_HEAD_DIM or q.shape[3] % 2 != 0,
        "cos or sin is not dense, [1, T, D]": any(
            not angle.is_contiguous() or angle.shape[-2:] != q.shape[-2:] or any(size != 1 for size in angle.shape[:-2])
            for angle in (cos, sin)
        ),
        "a weight is not one dense vector": any(w is not None and w.shape != q.shape[-1:] for w in (q_weight, k_weight)),
    }
    return [reason for reason, holds in checks.items() if holds]
